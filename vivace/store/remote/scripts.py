"""What the server does in one step, in Lua. Every script's keys are of one slot of a cluster.

A history is one string: a byte that says whether the data set has the user, and a msgpack array of ``[item, event type,
time in ms]``, whose count is rewritten in place and whose end grows. Numbers are text of 16 digits where they lead a
value.
"""

from __future__ import annotations

from vivace.store.remote.trips import Script

NUMBER_DIGITS = 16
OF_DATA_SET, NEWCOMER = b"\1", b"\0"
HEADER = 6  # bytes of a history before its first event: the flag, 0xdd, the count

_HISTORY = """
local function shortened(value, most)
  local count = struct.unpack('>I4', value, 3)
  if count <= most then return value end
  local body, at = string.sub(value, 7), 0
  for _ = 1, count - most do at = cmsgpack.unpack_limit(body, 1, at) end
  return string.sub(value, 1, 2) .. struct.pack('>I4', most) .. (at < 0 and '' or string.sub(body, at + 1))
end
"""

# keys: about, log, ids. arguments: (digest of the event's id, record) of each event.
# reply: generation, the one that is being filled, number of each event; one that was sent before keeps its number
LOG_EVENTS = Script("""
local about = redis.call('HMGET', KEYS[1], 'number', 'generation', 'filling')
local last = tonumber(about[1] or '0')
local out = {about[2] or '0', about[3] or ''}
for i = 1, #ARGV, 2 do
  local known = ARGV[i] ~= '' and redis.call('HGET', KEYS[3], ARGV[i])
  if not known then
    last = last + 1
    known = string.format('%.0f', last)
    redis.call('ZADD', KEYS[2], known, string.format('%016.0f', last) .. ARGV[i + 1])
    if ARGV[i] ~= '' then redis.call('HSET', KEYS[3], ARGV[i], known) end
  end
  out[#out + 1] = known
end
redis.call('HSET', KEYS[1], 'number', string.format('%.0f', last))
return out
""")

# keys: a user's history and set of numbers. arguments: most events, (number, event) of each.
# reply: the history's length. An event that is there already is left out; without events nothing is written
APPLY_EVENTS = Script(
    _HISTORY
    + """
local head, count = redis.call('GETRANGE', KEYS[1], 0, 5), 0
if head == '' then
  if #ARGV < 2 then return 0 end
  redis.call('SET', KEYS[1], string.char(0, 221, 0, 0, 0, 0))
else
  count = struct.unpack('>I4', head, 3)
end
local most = tonumber(ARGV[1])
for i = 2, #ARGV, 2 do
  if redis.call('SADD', KEYS[2], ARGV[i]) == 1 then
    redis.call('APPEND', KEYS[1], ARGV[i + 1])
    count = count + 1
  end
end
redis.call('SETRANGE', KEYS[1], 2, struct.pack('>I4', count))
if count > most then
  redis.call('SET', KEYS[1], shortened(redis.call('GET', KEYS[1]), most))
  count = most
end
return count
"""
)

# keys: as above. arguments: most events, the history of a data set, numbers of the live events in it.
# What was appended since the fill began follows it; a history that was put already stays
PUT_HISTORY = Script(
    _HISTORY
    + """
local value, old = ARGV[2], redis.call('GET', KEYS[1])
if old and string.sub(old, 1, 1) == string.char(1) then return 0 end
if ARGV[3] and redis.call('SISMEMBER', KEYS[2], ARGV[3]) == 1 then return 0 end
if old then
  local count = struct.unpack('>I4', value, 3) + struct.unpack('>I4', old, 3)
  value = string.sub(value, 1, 2) .. struct.pack('>I4', count) .. string.sub(value, 7) .. string.sub(old, 7)
end
redis.call('SET', KEYS[1], shortened(value, tonumber(ARGV[1])))
for i = 3, #ARGV do redis.call('SADD', KEYS[2], ARGV[i]) end
return 1
"""
)

# keys: a user's history, set of numbers and attributes. arguments: numbers that have left the log.
# A user who is none of the data set's goes with the last of them
LEAVE = Script("""
for i = 1, #ARGV do redis.call('SREM', KEYS[2], ARGV[i]) end
if redis.call('SCARD', KEYS[2]) == 0 and redis.call('GETRANGE', KEYS[1], 0, 0) == string.char(0) then
  return redis.call('DEL', KEYS[1], KEYS[3])
end
return 0
""")

# keys: about, log. reply: (generation that is filled from now on, number of the newest event, of the oldest kept)
BEGIN_FILL = Script("""
local mine = redis.call('HINCRBY', KEYS[1], 'generations', 1)
redis.call('HSET', KEYS[1], 'filling', tostring(mine))
return {tostring(mine), redis.call('HGET', KEYS[1], 'number') or '0'}
""")

# keys: about. arguments: the generation that was filled, event types, ms. reply: 0 where another fill has begun
EXCHANGE = Script("""
if redis.call('HGET', KEYS[1], 'filling') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'generation', ARGV[1], 'filling', '', 'event_types', ARGV[2], 'filled_ms', ARGV[3])
return 1
""")

# keys: log. arguments: first and last number, what a record holds. reply: those that hold it
FIND = Script("""
local out = {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], ARGV[1], ARGV[2], 'BYSCORE')) do
  if string.find(member, ARGV[3], 1, true) then out[#out + 1] = member end
end
return out
""")

# keys: log, ids. arguments: (number, digest) of each event
ERASE = Script("""
for i = 1, #ARGV, 2 do
  redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[i], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('HDEL', KEYS[2], ARGV[i + 1]) end
end
return 1
""")

# -- the catalogue; keys: number, changes, rows -----------------------------------------------------------
# arguments: when it came, in ms, (item, change) of each. reply: number and slot of each
CHANGE = Script("""
local last, out = tonumber(redis.call('GET', KEYS[1]) or '0'), {}
for i = 2, #ARGV, 2 do
  last = last + 1
  local number, before = string.format('%016.0f', last), redis.call('HGET', KEYS[3], ARGV[i])
  local slot = before and string.sub(before, 17, 32) or number
  redis.call('HSET', KEYS[3], ARGV[i], number .. slot .. string.format('%016.0f', tonumber(ARGV[1])) .. ARGV[i + 1])
  redis.call('ZADD', KEYS[2], string.format('%.0f', last), ARGV[i])
  out[#out + 1] = number
  out[#out + 1] = slot
end
redis.call('SET', KEYS[1], string.format('%.0f', last))
return out
""")

# arguments: number, most. reply: rows of the oldest changes after it
CHANGES_AFTER = Script("""
local out = {}
for _, item in ipairs(redis.call('ZRANGE', KEYS[2], '(' .. ARGV[1], '+inf', 'BYSCORE', 'LIMIT', 0, ARGV[2])) do
  out[#out + 1] = redis.call('HGET', KEYS[3], item)
end
return out
""")

# arguments: numbers. reply: how many were still the newest of their items
DROP_CHANGES = Script("""
local dropped = 0
for i = 1, #ARGV do
  for _, item in ipairs(redis.call('ZRANGE', KEYS[2], ARGV[i], ARGV[i], 'BYSCORE')) do
    redis.call('ZREM', KEYS[2], item)
    redis.call('HDEL', KEYS[3], item)
    dropped = dropped + 1
  end
end
return dropped
""")
