-- Whether a call is answered by the version on trial, by a salted hash of its user (``serving.door.rollout.Split``). Of a
-- request of several rows the first one's user counts; of someone anonymous the request's parameter "session".

local ROLLOUT, VARIANT = "x-vivace-rollout", "x-vivace-variant" -- the second goes by none but us

-- The limit and the salt that a filter before this one has set, nil outside a rollout; a caller's own mark is gone.
function read_rollout(headers)
  headers:remove(VARIANT)
  return headers:get(ROLLOUT)
end

-- The first text of BYTES as Triton packs them, from position ``first``.
function first_text(raw, first)
  local a, b, c, d = string.byte(raw, first, first + 3)
  if not d then return "" end
  return string.sub(raw, first + 4, first + 3 + a + b * 256 + c * 65536 + d * 16777216)
end

-- Who asks by a request read from JSON, whose binary part begins at ``first`` of ``text``; "" for nobody known.
function asks_over_http(request, text, first)
  if type(request) ~= "table" or type(request.inputs) ~= "table" then return "" end
  for _, input in ipairs(request.inputs) do
    local parameters = type(input) == "table" and type(input.parameters) == "table" and input.parameters or {}
    local size = parameters.binary_data_size
    if type(input) == "table" and input.name == "USER_ID" then
      local user = input.data
      while type(user) == "table" do user = user[1] end
      if type(size) == "number" then user = first_text(text, first) end
      if type(user) == "string" and user ~= "" then return user end
    end
    if type(size) == "number" then first = first + size end
  end
  local session = type(request.parameters) == "table" and request.parameters.session
  return type(session) == "string" and session or ""
end

-- The same by what ``read_infer`` read.
function asks_over_grpc(request)
  for i, input in ipairs(request.inputs) do
    if input.name == "USER_ID" then
      local user = first_text(request.raw[i] or input.contents or "", 1)
      if user ~= "" then return user end
    end
  end
  for _, parameter in ipairs(request.parameters) do
    local session = string.match(parameter, '^"session":(".*)$')
    if session then return read_json_string(session, 1) or "" end
  end
  return ""
end

-- Marks the call for the version on trial if its user is of the share.
function assign(handle, rollout, who)
  if who == "" then return end
  local limit, salt = string.match(rollout, "^(%d+) (.*)$")
  if tonumber(string.sub(sha256(salt .. "\0" .. who), 1, 8), 16) >= tonumber(limit) then return end
  handle:headers():replace(VARIANT, "trial")
  handle:clearRouteCache()
end
