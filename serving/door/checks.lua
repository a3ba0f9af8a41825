-- What Envoy asks of a request's body before Triton may see it. Each check stands for a way in which tritonserver 2.51
-- dies or is made to do what nobody meant: nested JSON overflows its stack, "classification" divides by zero, compressed
-- bodies are unpacked without bound, gRPC names its model inside the message, where no route sees it.

local PUBLIC = { recommend = true, append_event = true }
local MAX_DEPTH = 64

-- The reason becomes the body's "error" over HTTP and the status message over gRPC (``local_reply_config``).
local function refuse(handle, status, reason, code)
  local headers = { [":status"] = status }
  if code then headers["grpc-status"] = code end
  handle:respond(headers, reason)
end

-- Whether JSON text nests deeper than MAX_DEPTH. Brackets are counted first, which is one pass in C: fewer of them than
-- the limit cannot nest deeper. Only beyond does a pass tell brackets in strings from others.
local function too_deep(text)
  local _, brackets = string.gsub(text, "[%[{]", "")
  if brackets <= MAX_DEPTH then return false end
  local depth, position, length = 0, 1, #text
  while position <= length do
    local start = string.find(text, '["%[%]{}]', position)
    if not start then return false end
    local byte = string.byte(text, start)
    position = start + 1
    if byte == 34 then -- a string: on to its closing quote
      while true do
        local stop = string.find(text, '["\\]', position)
        if not stop then return false end
        position = stop + 1
        if string.byte(text, stop) == 34 then break end
        position = position + 1 -- what is escaped
      end
    elseif byte == 91 or byte == 123 then
      depth = depth + 1
      if depth > MAX_DEPTH then return true end
    else
      depth = depth - 1
    end
  end
  return false
end

-- Whether JSON text has the key "classification", however it is escaped.
local function classifies(text)
  if string.find(text, "\\u", 1, true) then
    text = string.gsub(text, "\\u00(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
  end
  return string.find(text, '"classification"%s*:') ~= nil
end

local function check_http(handle)
  local headers = handle:headers()
  if headers:get(":method") ~= "POST" then return end
  local encoding = headers:get("content-encoding")
  if encoding and encoding ~= "identity" then
    return refuse(handle, "415", "body: expected no Content-Encoding, got a compressed one; send it plain")
  end
  local json = tonumber(headers:get("inference-header-content-length") or "")
  local body = handle:body() -- from here on ``headers`` is gone: Envoy allows no object across a wait
  if not body then return end
  local length = body:length()
  json = json or length
  local text = body:getBytes(0, math.max(0, math.min(length, json)))
  if too_deep(text) then
    return refuse(handle, "400", "body: expected JSON nested at most " .. MAX_DEPTH .. " deep; flatten it")
  end
  if classifies(text) then
    return refuse(handle, "400", "outputs: the parameter classification is not supported; leave it out")
  end
end

local function check_grpc(handle)
  handle:headers():remove("x-vivace-model")
  if handle:headers():get(":path") ~= "/inference.GRPCInferenceService/ModelInfer" then return end
  local body = handle:body()
  if not body then return refuse(handle, "400", "expected a message, got none", "3") end
  local text = body:getBytes(0, body:length())
  if string.byte(text, 1) ~= 0 then
    return refuse(handle, "400", "message: expected it uncompressed; turn the compression of the channel off", "12")
  end
  local request, reason = read_infer(text, 6)
  if not request then return refuse(handle, "400", reason, "3") end
  if not PUBLIC[request.model] then
    return refuse(handle, "400", "model: expected recommend or append_event; no other model takes requests", "5")
  end
  handle:headers():replace("x-vivace-model", request.model)
  handle:clearRouteCache()
end

-- A check that fails itself lets nothing through.
local function closed(check, code)
  return function(handle)
    local done, reason = pcall(check, handle)
    if not done then
      handle:logErr(tostring(reason))
      refuse(handle, "400", "request: could not be checked", code)
    end
  end
end

guard_http, guard_grpc = closed(check_http, nil), closed(check_grpc, "3")
