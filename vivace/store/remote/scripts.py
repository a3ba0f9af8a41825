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

# -- groups of readers; keys: log, numbers (a stream of the log's numbers, with the groups), missed ------------
_STREAM = """
local function field(reply, name)
  for i = 1, #reply, 2 do if reply[i] == name then return reply[i + 1] end end
end
local function number(id) return tonumber(string.match(id, '^%d+')) end
local function id(n) return string.format('%.0f-0', n) end
local function record(n)
  local text = string.format('%.0f', n)
  return redis.call('ZRANGE', KEYS[1], text, text, 'BYSCORE')[1]
end
local function group_infos()
  if redis.call('EXISTS', KEYS[2]) == 0 then return {} end
  return redis.call('XINFO', 'GROUPS', KEYS[2])
end
"""

# arguments: group, number that it begins behind. reply: 1, or 0 where it was there
CREATE_GROUP = Script(
    _STREAM
    + """
for _, info in ipairs(group_infos()) do if field(info, 'name') == ARGV[1] then return 0 end end
redis.call('XGROUP', 'CREATE', KEYS[2], ARGV[1], ARGV[2] .. '-0', 'MKSTREAM')
return 1
"""
)

# arguments: group, consumer, most events, idle ms, most numbers that are looked at.
# reply: whether there may be more, then (number, how often it was handed out, record) of each; "" where there is no
# such group. What the log has got since joins the stream first
READ_GROUP = Script(
    _STREAM
    + """
local there = false
for _, info in ipairs(group_infos()) do there = there or field(info, 'name') == ARGV[1] end
if not there then return '' end
local last = string.match(field(redis.call('XINFO', 'STREAM', KEYS[2]), 'last-generated-id'), '^%d+')
local fresh = redis.call('ZRANGE', KEYS[1], '(' .. last, '+inf', 'BYSCORE', 'LIMIT', 0, ARGV[5])
for _, member in ipairs(fresh) do
  redis.call('XADD', KEYS[2], id(tonumber(string.sub(member, 1, 16))), 'n', '')
end
local most, out, cursor = tonumber(ARGV[3]), {#fresh == tonumber(ARGV[5]) and 1 or 0}, '0-0'
local function hand_out(ids, again)
  for _, entry in ipairs(ids) do
    local n, times = number(entry[1]), 1
    local value = record(n)
    if value then
      if again then times = redis.call('XPENDING', KEYS[2], ARGV[1], entry[1], entry[1], 1)[1][4] end
      out[#out + 1], out[#out + 2], out[#out + 3] = id(n), times, value
    else
      redis.call('XACK', KEYS[2], ARGV[1], entry[1])
    end
  end
end
local function left() return most - (#out - 1) / 3 end
repeat
  local claimed = redis.call('XAUTOCLAIM', KEYS[2], ARGV[1], ARGV[2], ARGV[4], cursor, 'COUNT', left())
  cursor = claimed[1]
  hand_out(claimed[2], true)
until cursor == '0-0' or left() == 0
if left() > 0 then
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', left(), 'STREAMS', KEYS[2], '>')
  local got = reply and reply[1][2] or {}
  if #got == left() then out[1] = 1 end
  hand_out(got, false)
end
return out
"""
)

# reply: of each group its name, the newest number that was handed out, how many are open, the oldest of them (or
# nothing), how many in the log are ahead, how many were missed
GROUP_STATES = Script(
    _STREAM
    + """
local out = {}
for _, info in ipairs(group_infos()) do
  local name, delivered = field(info, 'name'), string.match(field(info, 'last-delivered-id'), '^%d+')
  local open = redis.call('XPENDING', KEYS[2], name)
  local ahead = redis.call('ZCOUNT', KEYS[1], '(' .. delivered, '+inf')
  out[#out + 1] = {name, delivered, open[1], open[2] or '', ahead, redis.call('HGET', KEYS[3], name) or '0'}
end
return out
"""
)

# arguments: group. reply: whether it was there. With the last one the stream goes
DROP_GROUP = Script(
    _STREAM
    + """
redis.call('HDEL', KEYS[3], ARGV[1])
if #group_infos() == 0 then return 0 end
local gone = redis.call('XGROUP', 'DESTROY', KEYS[2], ARGV[1])
if #group_infos() == 0 then redis.call('DEL', KEYS[2]) end
return gone
"""
)

# keys: as above, then ids. arguments: ms after which a consumer without anything open is forgotten, (number, digest) of
# each event that leaves the log, oldest first. reply: (group, how many of them it had not acknowledged)
AGE_OUT = Script(
    _STREAM
    + """
local first, last, out = ARGV[2] and tonumber(ARGV[2]), ARGV[2] and tonumber(ARGV[#ARGV - 1]), {}
for _, info in ipairs(group_infos()) do
  local name, delivered = field(info, 'name'), number(field(info, 'last-delivered-id'))
  local missed = 0
  if first and delivered < last then
    local from = math.max(delivered + 1, first)
    missed = redis.call('ZCOUNT', KEYS[1], string.format('%.0f', from), string.format('%.0f', last))
  end
  for _, open in ipairs(first and redis.call('XPENDING', KEYS[2], name, '-', id(last), #ARGV) or {}) do
    if record(number(open[1])) then missed = missed + 1 end
    redis.call('XACK', KEYS[2], name, open[1])
  end
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[2], name)) do
    if field(consumer, 'pending') == 0 and field(consumer, 'idle') > tonumber(ARGV[1]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[2], name, field(consumer, 'name'))
    end
  end
  if missed > 0 then
    redis.call('HINCRBY', KEYS[3], name, missed)
    out[#out + 1] = {name, missed}
  end
end
for i = 2, #ARGV, 2 do
  redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[i], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('HDEL', KEYS[4], ARGV[i + 1]) end
end
if last and redis.call('EXISTS', KEYS[2]) == 1 then redis.call('XTRIM', KEYS[2], 'MINID', id(last + 1)) end
return out
"""
)

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
