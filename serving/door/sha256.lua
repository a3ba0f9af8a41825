-- SHA-256 (FIPS 180-4) of a short text, as 64 hex digits: Envoy's Lua has none of its own, and LuaJIT's bit operations
-- make one of 64 bytes in microseconds.

local band, bnot, bxor, ror, rshift = bit.band, bit.bnot, bit.bxor, bit.ror, bit.rshift

-- The first 32 bits of the fractional parts of the square roots of the first 8 primes and of the cube roots of the
-- first 64, as the standard defines them. A double has 53 bits, of which the fraction of a root below 8 keeps 50.
local START, ROUND = {}, {}
do
  local found, candidate = 0, 2
  local function fraction(x) return bit.tobit(math.floor((x % 1) * 4294967296)) end
  while found < 64 do
    local prime = true
    for divisor = 2, math.floor(math.sqrt(candidate)) do prime = prime and candidate % divisor ~= 0 end
    if prime then
      found = found + 1
      if found <= 8 then START[found] = fraction(math.sqrt(candidate)) end
      ROUND[found] = fraction(candidate ^ (1 / 3))
    end
    candidate = candidate + 1
  end
end

local function padded(text)
  local bits = #text * 8
  local length = string.char(0, 0, 0, 0, band(rshift(bits, 24), 255), band(rshift(bits, 16), 255), band(rshift(bits, 8), 255), band(bits, 255))
  return text .. "\128" .. string.rep("\0", (55 - #text) % 64) .. length
end

local words = {} -- of one block, for all calls
local tobit = bit.tobit

function sha256(text)
  local whole = padded(text)
  local hash = { unpack(START) }
  for first = 1, #whole, 64 do
    for i = 1, 16 do
      local a, b, c, d = string.byte(whole, first + 4 * i - 4, first + 4 * i - 1)
      words[i] = tobit(a * 16777216 + b * 65536 + c * 256 + d)
    end
    for i = 17, 64 do
      local x, y = words[i - 15], words[i - 2]
      local s0 = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
      local s1 = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
      words[i] = tobit(words[i - 16] + s0 + words[i - 7] + s1)
    end
    local a, b, c, d, e, f, g, h = unpack(hash)
    for i = 1, 64 do
      local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
      local t1 = tobit(h + s1 + bxor(band(e, f), band(bnot(e), g)) + ROUND[i] + words[i])
      local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
      local t2 = s0 + bxor(band(a, b), band(a, c), band(b, c))
      a, b, c, d, e, f, g, h = tobit(t1 + t2), a, b, c, tobit(d + t1), e, f, g
    end
    for i, value in ipairs({ a, b, c, d, e, f, g, h }) do hash[i] = tobit(hash[i] + value) end
  end
  local digits = {}
  for i = 1, 8 do digits[i] = bit.tohex(hash[i]) end
  return table.concat(digits)
end
