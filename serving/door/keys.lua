-- Who may call. KEYS, by the SHA-256 of a key: {name, whether it may write, when it expires in Unix seconds or nil}.
-- What is found goes on as headers of our own: the limits read the key's name, the routes whether it may write.

local MOST_BYTES = 200 -- of a key
local PROBES = { -- tell nothing but whether the server works, to whoever watches it
  ["/v2/health/live"] = true, ["/v2/health/ready"] = true,
  ["/inference.GRPCInferenceService/ServerLive"] = true, ["/inference.GRPCInferenceService/ServerReady"] = true,
}

local function unknown(handle, reason)
  local headers = { [":status"] = "401", ["www-authenticate"] = "Bearer" }
  if string.find(handle:headers():get("content-type") or "", "application/grpc", 1, true) == 1 then
    headers["grpc-status"] = "16"
  end
  handle:respond(headers, reason)
end

local function check(handle)
  local headers = handle:headers()
  headers:remove("x-vivace-access")
  headers:replace("x-vivace-key", "-")
  if PROBES[string.match(headers:get(":path") or "", "^[^?]*")] then return end
  local given = headers:get("authorization")
  if not given then return unknown(handle, "key: expected one, got none; send 'authorization: Bearer KEY'") end
  local key = string.match(given, "^[Bb][Ee][Aa][Rr][Ee][Rr] +(%S+) *$")
  if not key or headers:getNumValues("authorization") ~= 1 then
    return unknown(handle, "key: expected one header 'authorization: Bearer KEY', got something else")
  end
  local entry = #key <= MOST_BYTES and KEYS[sha256(key)]
  if not entry then return unknown(handle, "key: not one of this server's; ask whoever runs it for one") end
  if entry[3] and os.time() >= entry[3] then
    return unknown(handle, "key " .. entry[1] .. ": has expired; ask whoever runs the server for another")
  end
  headers:replace("x-vivace-key", entry[1])
  headers:replace("x-vivace-access", entry[2] and "write" or "read")
end

-- A check that fails itself lets nobody through.
function envoy_on_request(handle)
  local done, reason = pcall(check, handle)
  if not done then
    handle:logErr(tostring(reason))
    unknown(handle, "key: could not be checked")
  end
end
