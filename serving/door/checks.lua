-- What Envoy asks of a request's body before Triton may see it. Each check stands for a way in which tritonserver 2.51
-- dies or is made to do what nobody meant: nested JSON overflows its stack, "classification" divides by zero, compressed
-- bodies are unpacked without bound, gRPC names its model inside the message, where no route sees it.

local PUBLIC = { recommend = true, explain = true, append_event = true, update_store = true }
local MAX_DEPTH = 64
local MAX_BRACKETS = 200000 -- what a pass that tells strings from brackets is worth
local MAX_HEAD = 65536 -- bytes of the JSON head of a binary request
local MAX_READ = 4096 -- bytes of a gRPC call that only reads
local CUT = "a BYTES input is cut short: expected each text whole, behind its length of four bytes"

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
  if brackets > MAX_BRACKETS then return true end
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

-- Why the binary part of a request, which the JSON head describes, is refused; nil where it is whole.
local function binary_fault(head, text, first)
  local request = read_json(head)
  if type(request) ~= "table" or type(request.inputs) ~= "table" then return "expected a JSON head with inputs" end
  for _, input in ipairs(request.inputs) do
    local parameters = type(input) == "table" and input.parameters or nil
    local size = type(parameters) == "table" and parameters.binary_data_size or nil
    if type(size) == "number" then
      if size < 0 or size % 1 ~= 0 or first + size - 1 > #text then return "binary_data_size: more than was sent" end
      if input.datatype == "BYTES" and not whole_strings(text, first, first + size - 1) then return CUT end
      first = first + size
    end
  end
  return nil
end

local ALONE = "outputs: STATUS comes with the answer, not alone; ask for ITEM_ID too, or name no output"

-- Whether JSON text asks for STATUS and nothing else, which Triton's ensemble cannot answer.
local function only_status(text)
  local start = string.find(text, '"outputs"', 1, true)
  local outputs = start and string.match(text, "^%s*:%s*(%b[])", start + 9)
  if not outputs then return false end
  local names, status = 0, 0
  for name in string.gmatch(outputs, '"name"%s*:%s*"([^"]*)"') do
    names, status = names + 1, status + (name == "STATUS" and 1 or 0)
  end
  return names > 0 and names == status
end

local function check_http(handle)
  local headers = handle:headers()
  if headers:get(":method") ~= "POST" then return end
  local encoding = headers:get("content-encoding")
  if encoding and encoding ~= "identity" then
    return refuse(handle, "415", "body: expected no Content-Encoding, got a compressed one; send it plain")
  end
  local head = headers:get("inference-header-content-length")
  if head and (headers:getNumValues("inference-header-content-length") ~= 1 or not string.match(head, "^%d+$")) then
    return refuse(handle, "400", "Inference-Header-Content-Length: expected one number of bytes; send it once")
  end
  local json = head and tonumber(head)
  local ranks = string.find(headers:get(":path"), "/recommend/", 1, true)
  local rollout = read_rollout(headers)
  if forget_user then forget_user(headers) end -- of by_user.lua, where that is on
  local body = handle:body() -- from here on ``headers`` is gone: Envoy allows no object across a wait
  if not body then return end
  local length = body:length()
  local whole = body:getBytes(0, length)
  local text = json and string.sub(whole, 1, math.max(0, json)) or whole
  if too_deep(text) then
    return refuse(handle, "400", "body: expected JSON nested at most " .. MAX_DEPTH .. " deep; flatten it")
  end
  if classifies(text) then
    return refuse(handle, "400", "outputs: the parameter classification is not supported; leave it out")
  end
  if ranks and only_status(text) then return refuse(handle, "400", ALONE) end
  if json and #text > MAX_HEAD then
    return refuse(handle, "400", "body: expected a JSON head of at most " .. MAX_HEAD .. " bytes")
  end
  if json then
    local fault = binary_fault(text, whole, #text + 1)
    if fault then return refuse(handle, "400", "body: " .. fault) end
  end
  if ranks and (rollout or name_user) then
    local who = asks_over_http(read_json(text), whole, #text + 1)
    if name_user then name_user(handle, who) end
    if rollout then assign(handle, rollout, who) end
  end
end

local READS_OF_A_MODEL = {
  ["/inference.GRPCInferenceService/ModelReady"] = {}, ["/inference.GRPCInferenceService/ModelMetadata"] = {},
  ["/inference.GRPCInferenceService/ModelConfig"] = { explain = false, append_event = false, update_store = false }, -- they name the store
}

local function check_grpc(handle)
  local headers = handle:headers()
  headers:remove("x-vivace-model")
  if forget_user then forget_user(headers) end
  local rollout = read_rollout(headers)
  local path, encoding = headers:get(":path"), headers:get("grpc-encoding")
  if encoding and encoding ~= "identity" then
    return refuse(handle, "400", "message: expected it uncompressed; turn the compression of the channel off", "12")
  end
  local body = handle:body()
  if not body then return refuse(handle, "400", "expected a message, got none", "3") end
  local infers = path == "/inference.GRPCInferenceService/ModelInfer"
  if not infers and body:length() > MAX_READ then return refuse(handle, "400", "message: longer than any such call", "3") end
  local text = body:getBytes(0, body:length())
  if string.byte(text, 1) ~= 0 then
    return refuse(handle, "400", "message: expected it uncompressed; turn the compression of the channel off", "12")
  end
  local name = READS_OF_A_MODEL[path] and read_name(text, 6)
  if name and not (PUBLIC[name] and READS_OF_A_MODEL[path][name] ~= false) then
    return refuse(handle, "400", "model: expected recommend, explain, append_event or update_store; no other model is shown", "5")
  end
  if not infers then return end
  local request, reason = read_infer(text, 6)
  if not request then return refuse(handle, "400", reason, "3") end
  if not PUBLIC[request.model] then
    return refuse(handle, "400", "model: expected recommend, explain, append_event or update_store; no other model takes requests", "5")
  end
  local status = 0
  for _, name in ipairs(request.outputs) do status = status + (name == "STATUS" and 1 or 0) end
  if status > 0 and status == #request.outputs and request.model == "recommend" then
    return refuse(handle, "400", ALONE, "3")
  end
  for i, input in ipairs(request.inputs) do
    local raw = request.raw[i]
    if raw and input.datatype == "BYTES" and not whole_strings(raw, 1, #raw) then
      return refuse(handle, "400", "inputs: " .. CUT, "3")
    end
  end
  handle:headers():replace("x-vivace-model", request.model)
  if request.model == "recommend" and (rollout or name_user) then
    local who = asks_over_grpc(request)
    if name_user then name_user(handle, who) end
    if rollout then assign(handle, rollout, who) end
  end
  send_over_http(handle, request)
  handle:clearRouteCache()
end

-- Over HTTP too, what the caller got wrong is no fault of the server's.
function blame_caller(handle)
  if handle:headers():get(":status") ~= "500" then return end
  local body = handle:body()
  if body and callers_fault(body:getBytes(0, math.min(body:length(), 100))) then
    handle:headers():replace(":status", "400")
  end
end

-- A check that fails itself lets nothing through.
local function closed(check, code)
  return function(handle)
    local done, reason = pcall(check, handle)
    if not done then
      handle:logErr(tostring(reason))
      refuse(handle, "400", "request: could not be checked", code)
    end
    tidy()
  end
end

guard_http, guard_grpc = closed(check_http, nil), closed(check_grpc, "3")
