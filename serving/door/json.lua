-- A small JSON reader: tables for objects and arrays, numbers, true and false, JSON's null as ``null``. Raises an error
-- where the text is no JSON. For the short JSON head of a binary request, after its depth was checked.

null = {}
MAX_TEXTS = 500000 -- of one input
local MAX_HEAP_KIB = 16384 -- of one filter in one thread

-- Small requests leave little: looking for garbage less often is a twelfth of the guard's processor time of a gRPC call.
collectgarbage("setpause", 400)

-- After a request: garbage of large bodies goes at once, as Lua would let it grow to several times what it needs.
function tidy()
  if collectgarbage("count") > MAX_HEAP_KIB then collectgarbage() end
end

local ESCAPES = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function skip(text, position) return string.find(text, "[^ \t\r\n]", position) or #text + 1 end

-- A code point as UTF-8.
local function utf8(code)
  if code < 128 then return string.char(code) end
  if code < 2048 then return string.char(192 + math.floor(code / 64), 128 + code % 64) end
  local low = string.char(128 + math.floor(code / 64) % 64, 128 + code % 64)
  if code < 65536 then return string.char(224 + math.floor(code / 4096)) .. low end
  return string.char(240 + math.floor(code / 262144), 128 + math.floor(code / 4096) % 64) .. low
end

local function hex4(text, position)
  local digits = string.match(text, "^%x%x%x%x", position)
  return digits and tonumber(digits, 16)
end

local function read_string(text, position) -- position: behind the opening quote
  local parts = {}
  while true do
    local stop = string.find(text, '["\\]', position)
    if not stop then error("a text does not end") end
    parts[#parts + 1] = string.sub(text, position, stop - 1)
    if string.byte(text, stop) == 34 then return table.concat(parts), stop + 1 end
    local escaped = string.sub(text, stop + 1, stop + 1)
    if escaped == "u" then
      local code = hex4(text, stop + 2)
      if not code then error("an escape is none") end
      position = stop + 6
      local second = code >= 0xD800 and code < 0xDC00 and string.sub(text, position, position + 1) == "\\u" and hex4(text, position + 2)
      if second and second >= 0xDC00 and second < 0xE000 then -- a pair of surrogates
        code, position = 65536 + (code - 0xD800) * 1024 + second - 0xDC00, position + 6
      end
      parts[#parts + 1] = utf8(code)
    else
      parts[#parts + 1] = ESCAPES[escaped] or escaped
      position = stop + 2
    end
  end
end

-- The text of a JSON string whose opening quote is at ``position``; nil where there is none.
function read_json_string(text, position)
  if string.byte(text, position) ~= 34 then return nil end
  local done, value = pcall(read_string, text, position + 1)
  return done and value or nil
end

local read_value

local function read_array(text, position)
  local items = {}
  position = skip(text, position)
  if string.byte(text, position) == 93 then return items, position + 1 end
  while true do
    items[#items + 1], position = read_value(text, position)
    position = skip(text, position)
    local byte = string.byte(text, position)
    if byte == 93 then return items, position + 1 end
    if byte ~= 44 then error("expected , or ]") end
    position = position + 1
  end
end

local function read_object(text, position)
  local object = {}
  position = skip(text, position)
  if string.byte(text, position) == 125 then return object, position + 1 end
  while true do
    position = skip(text, position)
    if string.byte(text, position) ~= 34 then error("expected a name") end
    local name
    name, position = read_string(text, position + 1)
    position = skip(text, position)
    if string.byte(text, position) ~= 58 then error("expected :") end
    if object[name] ~= nil then error("a name comes twice") end -- readers differ on which one counts
    object[name], position = read_value(text, position + 1)
    position = skip(text, position)
    local byte = string.byte(text, position)
    if byte == 125 then return object, position + 1 end
    if byte ~= 44 then error("expected , or }") end
    position = position + 1
  end
end

local WORDS = { ["true"] = true, ["false"] = false, ["null"] = null }

read_value = function(text, position)
  position = skip(text, position)
  local byte = string.byte(text, position)
  if byte == 34 then return read_string(text, position + 1) end
  if byte == 91 then return read_array(text, position + 1) end
  if byte == 123 then return read_object(text, position + 1) end
  local word = string.match(text, "^[%w.+-]+", position)
  local value = word and WORDS[word]
  if value == nil then value = tonumber(word or "") end
  if value == nil then error("expected a value") end
  return value, position + #word
end

-- What ``text`` says; nil where it is no JSON.
function read_json(text)
  local done, value, position = pcall(read_value, text, 1)
  if not done or skip(text, position) <= #text then return nil end
  return value
end

-- Whether Triton's error is about what the caller sent: it calls JSON that it cannot read an error of its own.
function callers_fault(text)
  return string.find(text, '"error":"Unable to parse ', 1, true) or string.find(text, '"error":"failed to parse the req', 1, true)
    or string.find(text, '"error":"failed to get request', 1, true)
end

-- Whether text[first..last] is BYTES as Triton packs them: each with its length before it, the last one whole.
function whole_strings(text, first, last)
  local position, count = first, 0
  while position <= last do
    count = count + 1
    if count > MAX_TEXTS then return false end
    local a, b, c, d = string.byte(text, position, position + 3)
    if not d then return false end
    position = position + 4 + a + b * 256 + c * 65536 + d * 16777216
    if position > last + 1 then return false end
  end
  return true
end
