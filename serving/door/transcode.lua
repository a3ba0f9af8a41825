-- gRPC's ModelInfer to Triton's HTTP call with binary tensors, and the answer back (KServe v2, both). Why: tritonserver
-- 2.51 dies when a gRPC call that it works on is cancelled or runs into its deadline, which ordinary clients do; its HTTP
-- side takes a caller that hangs up. Envoy's gRPC bridge takes the frame off the message and puts it and the trailers
-- back on; the status that belongs into the trailers goes through a header of the answer.

local SPACE = "vivace"
local FAILED = "x-vivace-failed" -- header of an answer, from here to ``end_grpc``: status and message of a call that failed
local FRAME = "\0\0\0\0\0" -- stands for gRPC's, whose length nobody reads
local UNWANTED = { "te", "accept-encoding", "content-encoding", "expect" }
local MAX_PARTS = 32 -- inputs, outputs or parameters of a request
local MAX_AXES = 8
local MAX_VALUES = 500000 -- of an input that is sent as protobuf's own fields

-- -- protobuf ------------------------------------------------------------------------------------------------------
-- (value, next position) of a varint; nil where it does not end. Exact up to 2^53.
local function varint(text, position)
  local first = string.byte(text, position)
  if first and first < 128 then return first, position + 1 end -- most of them
  local value, scale = 0, 1
  for _ = 1, 10 do
    local byte = string.byte(text, position)
    if not byte then return nil end
    position = position + 1
    value = value + (byte % 128) * scale
    if byte < 128 then return value, position end
    scale = scale * 128
  end
  return nil
end

-- Calls each(field, first, last) for every length-delimited field and each(field, nil, nil, value, first, last) for
-- every other one of the message text[first..last]; false if malformed, or once ``each`` says false.
local function fields(text, first, last, each)
  local position = first
  while position <= last do
    local key, after = varint(text, position)
    if not key then return false end
    local kind, field = key % 8, math.floor(key / 8)
    if kind == 2 then
      local size, start = varint(text, after)
      if not size or start + size - 1 > last then return false end
      if each(field, start, start + size - 1) == false then return false end
      position = start + size
    elseif kind == 0 then
      local value, following = varint(text, after)
      if not following then return false end
      if each(field, nil, nil, value, after, following - 1) == false then return false end
      position = following
    elseif kind == 1 or kind == 5 then
      local size = kind == 1 and 8 or 4
      if after + size - 1 > last then return false end
      if each(field, nil, nil, nil, after, after + size - 1) == false then return false end
      position = after + size
    else
      return false
    end
  end
  return position == last + 1
end

-- A varint's bytes text[first..last] as an integer of ``size`` bytes, little endian, two's complement.
local function little_endian(text, first, last, size)
  local out, carry, bits = {}, 0, 0
  for position = first, last do
    carry = carry + (string.byte(text, position) % 128) * 2 ^ bits
    bits = bits + 7
    while bits >= 8 and #out < size do
      out[#out + 1] = string.char(carry % 256)
      carry, bits = math.floor(carry / 256), bits - 8
    end
  end
  while #out < size do
    out[#out + 1] = string.char(carry % 256)
    carry = math.floor(carry / 256)
  end
  return table.concat(out)
end

local function uint32(value)
  return string.char(value % 256, math.floor(value / 256) % 256, math.floor(value / 65536) % 256, math.floor(value / 16777216))
end

local function packed(text, first, last, size, out)
  local position = first
  while position <= last do
    local _, following = varint(text, position)
    if not following or #out >= MAX_VALUES then return false end
    out[#out + 1] = little_endian(text, position, following - 1, size)
    position = following
  end
end

local SIZE_OF = { [1] = 1, [2] = 4, [3] = 8, [4] = 4, [5] = 8 } -- fields of InferTensorContents that are varints

-- InferTensorContents as Triton's raw bytes.
local function raw_contents(text, first, last)
  local out = {}
  local whole = fields(text, first, last, function(field, start, stop, value, from, to)
    if #out >= MAX_VALUES then return false end
    if field == 8 and start then
      out[#out + 1] = uint32(stop - start + 1)
      out[#out + 1] = string.sub(text, start, stop)
    elseif SIZE_OF[field] then
      if start then return packed(text, start, stop, SIZE_OF[field], out)
      else out[#out + 1] = little_endian(text, from, to, SIZE_OF[field]) end
    elseif field == 6 or field == 7 then
      out[#out + 1] = string.sub(text, start or from, stop or to)
    end
  end)
  return whole and table.concat(out) or nil
end

-- -- JSON ----------------------------------------------------------------------------------------------------------
local function quoted(text)
  if not string.find(text, '[%c"\\]') then return '"' .. text .. '"' end
  return '"' .. string.gsub(text, '[%c"\\]', function(c) return string.format("\\u%04x", string.byte(c)) end) .. '"'
end

-- A protobuf int64 text[first..last] as decimal digits, exact between -2^53 and 2^53; nil beyond.
local function integer(text, first, last)
  local bytes = { string.byte(little_endian(text, first, last, 8), 1, 8) }
  local negative, value = bytes[8] >= 128, 0
  for place = 8, 1, -1 do value = value * 256 + (negative and 255 - bytes[place] or bytes[place]) end
  if negative then value = -value - 1 end
  return math.abs(value) < 2 ^ 53 and string.format("%.0f", value) or nil
end

-- A double of eight bytes at ``first`` as JSON; nil for infinity and NaN.
local function double(text, first)
  local b = { string.byte(text, first, first + 7) }
  local exponent, fraction = (b[8] % 128) * 16 + math.floor(b[7] / 16), b[7] % 16
  for place = 6, 1, -1 do fraction = fraction * 256 + b[place] end
  if exponent == 2047 then return nil end
  local value = exponent == 0 and fraction * 2 ^ -1074 or (1 + fraction * 2 ^ -52) * 2 ^ (exponent - 1023)
  return string.format("%.17g", b[8] >= 128 and -value or value)
end

-- -- the request ---------------------------------------------------------------------------------------------------
local function parameter(text, first, last)
  local key, value
  fields(text, first, last, function(field, start, stop)
    if field == 1 and start then key = string.sub(text, start, stop) end
    if field == 2 and start then
      fields(text, start, stop, function(kind, from, to, number, low, high)
        if kind == 1 then value = number ~= 0 and "true" or "false"
        elseif (kind == 2 or kind == 5) and number then value = integer(text, low, high)
        elseif kind == 4 and low then value = double(text, low)
        elseif kind == 3 and from then value = quoted(string.sub(text, from, to)) end
      end)
      if value == nil and stop < start then value = '""' end
    end
  end)
  return key, value
end

-- Field 1 of a message from position ``first``: the name that a read asks for.
function read_name(text, first)
  local name = ""
  fields(text, first, #text, function(field, start, stop)
    if field == 1 and start then name = string.sub(text, start, stop) end
  end)
  return name
end

-- A ModelInferRequest from position ``first``: {model, version, id, parameters, inputs, outputs, raw}, or nil and why not.
function read_infer(text, first)
  local request = { model = "", version = "", id = "", parameters = {}, inputs = {}, outputs = {}, raw = {} }
  local reason
  local whole = fields(text, first, #text, function(field, start, stop)
    if not start then return end
    if field == 1 then request.model = string.sub(text, start, stop)
    elseif field == 2 then request.version = string.sub(text, start, stop)
    elseif field == 3 then request.id = string.sub(text, start, stop)
    elseif field == 4 then
      local key, value = parameter(text, start, stop)
      if not key or not value or #request.parameters >= MAX_PARTS then
        reason = "parameters: expected at most " .. MAX_PARTS .. ", each a text, a truth or a number"
        return false
      end
      if key ~= "binary_data_output" then -- how HTTP answers is not the caller's to say
        request.parameters[#request.parameters + 1] = quoted(key) .. ":" .. value
      end
    elseif field == 5 then
      if #request.inputs >= MAX_PARTS then reason = "inputs: too many"; return false end
      local input = { name = "", datatype = "", shape = {} }
      local good = fields(text, start, stop, function(inner, from, to, number)
        if inner == 1 and from then input.name = string.sub(text, from, to)
        elseif inner == 2 and from then input.datatype = string.sub(text, from, to)
        elseif inner == 3 and from then
          local position = from
          while position <= to do
            local size, following = varint(text, position)
            if not size or #input.shape >= MAX_AXES then return false end
            input.shape[#input.shape + 1] = string.format("%.0f", size)
            position = following
          end
        elseif inner == 3 and number then
          if #input.shape >= MAX_AXES then return false end
          input.shape[#input.shape + 1] = string.format("%.0f", number)
        elseif inner == 4 then reason = "inputs: parameters such as shared memory are not supported; send the values"
        elseif inner == 5 and from then
          input.contents = raw_contents(text, from, to)
          if not input.contents then return false end
        end
      end)
      if not good then reason = reason or "inputs: not an InferInputTensor, or one of too many axes or values"; return false end
      request.inputs[#request.inputs + 1] = input
    elseif field == 6 then
      if #request.outputs >= MAX_PARTS then reason = "outputs: too many"; return false end
      local output = ""
      fields(text, start, stop, function(inner, from, to)
        if inner == 1 and from then output = string.sub(text, from, to)
        elseif inner == 2 then reason = "outputs: parameters such as classification are not supported; leave them out" end
      end)
      request.outputs[#request.outputs + 1] = output
    elseif field == 7 then
      if #request.raw >= MAX_PARTS then reason = "raw_input_contents: too many"; return false end
      request.raw[#request.raw + 1] = string.sub(text, start, stop)
    end
  end)
  if reason then return nil, reason end
  if not whole then return nil, "message: not a ModelInferRequest" end
  if request.version ~= "" and not string.match(request.version, "^%d+$") then
    return nil, "model_version: expected a number or none"
  end
  if #request.raw > 0 and #request.raw ~= #request.inputs then
    return nil, "raw_input_contents: expected one of each input"
  end
  return request
end

-- (path, JSON, binary part) of the HTTP call.
local function http_call(request)
  local inputs, outputs, binary = {}, {}, {}
  for i, input in ipairs(request.inputs) do
    local raw = request.raw[i] or input.contents or ""
    binary[i] = raw
    inputs[i] = string.format('{"name":%s,"datatype":%s,"shape":[%s],"parameters":{"binary_data_size":%d}}',
      quoted(input.name), quoted(input.datatype), table.concat(input.shape, ","), #raw)
  end
  for i, name in ipairs(request.outputs) do
    outputs[i] = string.format('{"name":%s,"parameters":{"binary_data":true}}', quoted(name))
  end
  local parameters = request.parameters
  if #outputs == 0 then parameters[#parameters + 1] = '"binary_data_output":true' end
  local json = { '{"inputs":[', table.concat(inputs, ","), '],"parameters":{', table.concat(parameters, ","), "}" }
  if #outputs > 0 then json[#json + 1] = ',"outputs":[' .. table.concat(outputs, ",") .. "]" end
  if request.id ~= "" then json[#json + 1] = ',"id":' .. quoted(request.id) end
  json[#json + 1] = "}"
  local version = request.version ~= "" and "/versions/" .. request.version or ""
  local path = "/v2/models/" .. request.model .. version .. "/infer"
  return path, table.concat(json), table.concat(binary)
end

-- Makes the call that ``request`` was read from one over HTTP, ahead of the bridge, which takes FRAME off again. So the
-- message is read once, by the checks.
function send_over_http(handle, request)
  local path, json, binary = http_call(request)
  handle:body():setBytes(FRAME .. json .. binary) -- and content-length with it
  local headers = handle:headers()
  headers:replace(":path", path)
  headers:replace("inference-header-content-length", tostring(#json))
  for _, name in ipairs(UNWANTED) do headers:remove(name) end
  handle:streamInfo():dynamicMetadata():set(SPACE, "infer", "yes")
end

-- -- the answer ----------------------------------------------------------------------------------------------------
local function varint_of(value)
  if value < 128 then return string.char(value) end
  if value < 16384 then return string.char(value % 128 + 128, math.floor(value / 128)) end
  local out = {}
  repeat
    local low = value % 128
    value = math.floor(value / 128)
    out[#out + 1] = string.char(value > 0 and low + 128 or low)
  until value == 0
  return table.concat(out)
end

local function field_of(number, text) return varint_of(number * 8 + 2) .. varint_of(#text) .. text end

local OUTPUT = '^{"name":"([^"]*)","datatype":"(%w+)","shape":%[([%d,]*)%],"parameters":{"binary_data_size":(%d+)}}()'

local function grpc_answer(json, binary)
  local _, place = string.find(json, '"outputs":[', 1, true)
  if not place then return nil end
  local parts, raw, position = {}, {}, 1
  local name, version = string.match(json, '"model_name":"([^"]*)","model_version":"([^"]*)"')
  parts[1] = field_of(1, name or "") .. field_of(2, version or "")
  local _, before = string.find(json, '"id":', 1, true) -- the first: what follows it in an id has its quotes escaped
  local id = before and before < place and read_json_string(json, before + 1)
  if id then parts[#parts + 1] = field_of(3, id) end
  while true do
    local output, datatype, shape, size, after = string.match(json, OUTPUT, place + 1)
    if not output then break end
    local axes = ""
    for axis in string.gmatch(shape, "%d+") do axes = axes .. varint_of(tonumber(axis)) end
    parts[#parts + 1] = field_of(5, field_of(1, output) .. field_of(2, datatype) .. field_of(3, axes))
    raw[#raw + 1] = field_of(6, string.sub(binary, position, position + size - 1))
    position, place = position + size, after -- behind the comma
  end
  if #raw == 0 or string.byte(json, place) ~= 93 then return nil end -- "]": each output was read
  return table.concat(parts) .. table.concat(raw)
end

local STATUS = { ["400"] = "3", ["404"] = "5", ["409"] = "6", ["413"] = "8", ["429"] = "8", ["499"] = "1", ["500"] = "13",
  ["501"] = "12", ["502"] = "14", ["503"] = "14", ["504"] = "4" }

-- gRPC's status message, percent-encoded.
local function percent(text)
  return (string.gsub(text, "[^ -$&-~]", function(c) return string.format("%%%02X", string.byte(c)) end))
end

local function answer_from_http(handle)
  local metadata = handle:streamInfo():dynamicMetadata():get(SPACE)
  if not metadata or metadata["infer"] ~= "yes" then return end
  local headers = handle:headers()
  local status = headers:get(":status")
  local code = headers:get("grpc-status")
  if code then -- a reply of Envoy's own, which has its status: the bridge would write over it
    headers:replace(FAILED, code .. " " .. (headers:get("grpc-message") or ""))
    headers:replace("content-type", "application/x-protobuf")
    return
  end
  local json_bytes = tonumber(headers:get("inference-header-content-length") or "")
  local body = handle:body()
  local text = body and body:getBytes(0, body:length()) or ""
  local answer, reason = "", nil
  if status == "200" then
    json_bytes = json_bytes or #text
    answer = grpc_answer(string.sub(text, 1, json_bytes), string.sub(text, json_bytes + 1))
    if not answer then answer, code, reason = "", "13", "server: an answer that cannot be read" end
  else
    code = callers_fault(text) and "3" or STATUS[status] or "2"
    local _, before = string.find(text, '^{"error":')
    reason = before and read_json_string(text, before + 1) or text
  end
  if body then body:setBytes(answer) end -- and content-length with it
  headers = handle:headers()
  if code then headers:replace(FAILED, code .. " " .. percent(reason)) end
  headers:replace(":status", "200")
  headers:replace("content-type", "application/x-protobuf")
  headers:remove("inference-header-content-length")
end

function from_http(handle)
  answer_from_http(handle)
  tidy()
end

-- The status of a call that failed goes into the trailers that the bridge made of an empty message.
function end_grpc(handle)
  local headers = handle:headers()
  local failed = headers:get(FAILED)
  if not failed then return end
  headers:remove(FAILED)
  headers:remove("grpc-status")
  headers:remove("grpc-message")
  local trailers = handle:trailers()
  if not trailers then return end
  local code, message = string.match(failed, "^(%d+) (.*)$")
  trailers:replace("grpc-status", code)
  trailers:replace("grpc-message", message)
end
