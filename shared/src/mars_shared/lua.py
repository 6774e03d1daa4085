"""The queue's Lua scripts: each is one atomic step on the server.

Every stream has one consumer group, and beside it a hash "<stream>:errors" that counts how attempts
at its entries ended: "<id>" reported errors, "<id>:handed_back" attempts that were given up through
no fault of the entry's, "<id>:alone" lone attempts that began and did not end with a word;
"<id>:alone_attempt" is the last of these. An entry is (payload, key); `key` is the dedupe key it was
first put under and travels along when a result is forwarded.

A claim is fenced: XPENDING's (consumer, times_delivered) must equal the claim's (consumer,
attempt). Whoever lost an entry to another consumer, or to a later attempt of its own name, fails
this test and changes nothing.
"""

GROUP = "mars"
RETURNED = "(returned)"
"""Holds entries that were handed back; no consumer may bear this name."""

_COMMON = f"""
local GROUP, RETURNED = '{GROUP}', '{RETURNED}'

local function create_group(stream)
  return redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
end

-- Rows {{id, consumer, idle_ms, times_delivered}}; nil if stream or group don't exist.
local function pending(...)
  local rows = redis.pcall('XPENDING', ...)
  if not rows.err then return rows end
  if string.find(rows.err, 'NOGROUP') then return nil end
  error(rows.err, 0)
end

local function owned(stream, id, consumer, attempt)
  local rows = pending(stream, GROUP, id, id, 1)
  return rows and rows[1] and rows[1][2] == consumer and rows[1][4] == tonumber(attempt)
end

-- Creating the group with the stream means that a full server, which refuses to create
-- anything, can still be drained by consumers that come later.
local function append(stream, payload, key)
  if redis.call('EXISTS', stream) == 0 then create_group(stream) end
  redis.call('XADD', stream, '*', 'payload', payload, 'key', key)
end

local function remove(stream, errors, id)
  redis.call('XACK', stream, GROUP, id)
  redis.call('HDEL', errors, id, id .. ':handed_back', id .. ':alone', id .. ':alone_attempt')
  return redis.call('XDEL', stream, id)
end

-- Makes an entry claimable by anyone: TIME 0 makes it idle since 1970. The attempt ends with a word,
-- so that it is no death, and no lone one either. Counts it under `field`.
local function hand_back(stream, errors, id, attempt, field)
  redis.call('XCLAIM', stream, GROUP, RETURNED, 0, id, 'TIME', 0, 'JUSTID')
  if redis.call('HGET', errors, id .. ':alone_attempt') == attempt then
    redis.call('HDEL', errors, id .. ':alone_attempt')
    redis.call('HINCRBY', errors, id .. ':alone', -1)
  end
  return redis.call('HINCRBY', errors, field, 1)
end

-- Adds a dead letter. XDEL comes first: a full server refuses XADD as a script's first write.
local function bury(dead, payload, key, reason, detail, stream, attempt)
  redis.call('XDEL', dead, '0-1')
  local time = redis.call('TIME')
  redis.call('XADD', dead, '*', 'payload', payload, 'key', key, 'reason', reason, 'detail', detail,
    'stream', stream, 'attempt', attempt, 'time', time[1] .. '.' .. string.format('%06d', time[2]))
  return 1
end

local function read(stream, id)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if entry then return entry[2][2], entry[2][4] end
  return '', ''
end

local function claimed(entry, attempt, errors)
  local id = entry[1]
  local counts = redis.call('HMGET', errors, id, id .. ':handed_back', id .. ':alone')
  return {{id, entry[2][2], attempt, tonumber(counts[1] or 0), tonumber(counts[2] or 0), tonumber(counts[3] or 0)}}
end

-- Begins the next attempt at an entry that was delivered before. An entry whose message was
-- deleted has nothing to be attempted and leaves no trace.
local function take_over(stream, errors, row, consumer, min_idle_ms)
  local entry = redis.call('XCLAIM', stream, GROUP, consumer, min_idle_ms, row[1])[1]
  if entry then return claimed(entry, row[4] + 1, errors) end
  remove(stream, errors, row[1])
end
"""

PUT = (
    _COMMON
    + """
-- KEYS stream, dedupe [, incarnation]; ARGV payload, key, bound, dedupe_s [, incarnation]. Returns the outcome
-- or, to an incarnation that is older than the recorded one, that one. The bound comes before the
-- record: a refused item must leave no trace, or its next put would be taken for a duplicate.
local recorded = KEYS[3] and tonumber(redis.call('GET', KEYS[3]) or -1)
if recorded and recorded > tonumber(ARGV[5]) then return recorded end
if redis.call('EXISTS', KEYS[2]) == 1 then return 'duplicate' end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) then return 'full' end
redis.call('SET', KEYS[2], '1', 'EX', ARGV[4])
if recorded then redis.call('SET', KEYS[3], ARGV[5]) end
append(KEYS[1], ARGV[1], ARGV[2])
return 'put'
"""
)

BEGIN_INCARNATION = """
-- KEYS incarnation; ARGV incarnation. Returns the newest, which is recorded. DEL comes first: a full server
-- refuses SET as a script's first write.
local newest = math.max(tonumber(redis.call('GET', KEYS[1]) or -1), tonumber(ARGV[1]))
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], newest)
return newest
"""

CLAIM = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV consumer, lease_ms. Oldest abandoned entry first, else the next new one.
while true do
  local rows = pending(KEYS[1], GROUP, 'IDLE', ARGV[2], '-', '+', 1)
  if not rows then create_group(KEYS[1]) return false end
  if not rows[1] then break end
  local claim = take_over(KEYS[1], KEYS[2], rows[1], ARGV[1], ARGV[2])
  if claim then return claim end
end
local fresh = redis.call('XREADGROUP', 'GROUP', GROUP, ARGV[1], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
return fresh and claimed(fresh[1][2][1], 1, KEYS[2])
"""
)

RESUME = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV consumer, ids that are left as they are.
local left, claims = {}, {}
for i = 2, #ARGV do left[ARGV[i]] = true end
for _, row in ipairs(pending(KEYS[1], GROUP, '-', '+', 1000000, ARGV[1]) or {}) do
  if not left[row[1]] then claims[#claims + 1] = take_over(KEYS[1], KEYS[2], row, ARGV[1], 0) end
end
return claims
"""
)

HEARTBEAT = (
    _COMMON
    + """
-- KEYS stream; ARGV id, consumer, attempt. JUSTID resets idleness and doesn't count as a delivery.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
redis.call('XCLAIM', KEYS[1], GROUP, ARGV[2], 0, ARGV[1], 'JUSTID')
return 1
"""
)

BEGIN_ALONE = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV id, consumer, attempt. The heartbeat comes first: a full server refuses to
-- count as a script's first write. Said twice, it counts once.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
redis.call('XCLAIM', KEYS[1], GROUP, ARGV[2], 0, ARGV[1], 'JUSTID')
local began = ARGV[1] .. ':alone_attempt'
if redis.call('HGET', KEYS[2], began) ~= ARGV[3] then
  redis.call('HSET', KEYS[2], began, ARGV[3])
  redis.call('HINCRBY', KEYS[2], ARGV[1] .. ':alone', 1)
end
return 1
"""
)

COMPLETE = (
    _COMMON
    + """
-- KEYS stream, errors [, forward]; ARGV id, consumer, attempt [, payload].
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local _, key = read(KEYS[1], ARGV[1])
remove(KEYS[1], KEYS[2], ARGV[1])
if KEYS[3] then append(KEYS[3], ARGV[4], key) end
return 1
"""
)

RETRY = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV id, consumer, attempt.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
return hand_back(KEYS[1], KEYS[2], ARGV[1], ARGV[3], ARGV[1])
"""
)

HAND_BACK = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV id, consumer, attempt.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
return hand_back(KEYS[1], KEYS[2], ARGV[1], ARGV[3], ARGV[1] .. ':handed_back')
"""
)

DEAD_LETTER = (
    _COMMON
    + """
-- KEYS stream, errors, dead; ARGV id, consumer, attempt, reason, detail.
if not owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local payload, key = read(KEYS[1], ARGV[1])
remove(KEYS[1], KEYS[2], ARGV[1])
return bury(KEYS[3], payload, key, ARGV[4], ARGV[5], KEYS[1], ARGV[3])
"""
)

REPORT_DEAD = (
    _COMMON
    + """
-- KEYS dead; ARGV payload, key, reason, detail.
return bury(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], KEYS[1], 0)
"""
)

REMOVE = (
    _COMMON
    + """
-- KEYS stream, errors; ARGV ids.
local removed = 0
for _, id in ipairs(ARGV) do removed = removed + remove(KEYS[1], KEYS[2], id) end
return removed
"""
)

OUTSTANDING = """
-- KEYS stream. Entry ids and dedupe keys, without the payloads.
local found = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do found[#found + 1] = {entry[1], entry[2][4]} end
return found
"""

REVIVE = (
    _COMMON
    + """
-- KEYS dead, retries; ARGV id, payload, id, payload, ... Moves these letters to the end of `retries`, each with the payload
-- given; all of them or none: returns the id of one that is not there, else ''.
for i = 1, #ARGV, 2 do
  if not redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1] then return ARGV[i] end
end
for i = 1, #ARGV, 2 do
  local _, key = read(KEYS[1], ARGV[i])
  append(KEYS[2], ARGV[i + 1], key)
  redis.call('XDEL', KEYS[1], ARGV[i])
end
return ''
"""
)

BEAT = """
-- KEYS services, starts; ARGV name, heartbeat, begins. A heartbeat is kept with Redis's time in milliseconds before it.
-- HDEL comes first: a full server refuses HSET as a script's first write.
redis.call('HDEL', KEYS[1], ARGV[1])
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], time[1] .. string.format('%03d', math.floor(time[2] / 1000)) .. ' ' .. ARGV[2])
if ARGV[3] == '1' then redis.call('HINCRBY', KEYS[2], ARGV[1], 1) end
return 1
"""

LOOK = (
    _COMMON
    + """
-- KEYS services, starts, streams; ARGV forget_ms. Returns rows {heartbeat, silence_ms, starts}, and for each stream
-- {entries, claimed, age of the oldest in ms}. Heartbeats older than forget_ms are removed.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local beats, depths = {}, {}
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  local at, heartbeat = string.match(rows[i + 1], '^(%d+) (.*)$')
  if now - at > tonumber(ARGV[1]) then
    redis.call('HDEL', KEYS[1], rows[i])
  else
    beats[#beats + 1] = {heartbeat, math.max(0, now - at), tonumber(redis.call('HGET', KEYS[2], rows[i]) or 1)}
  end
end
for i = 3, #KEYS do
  local oldest = redis.call('XRANGE', KEYS[i], '-', '+', 'COUNT', 1)[1]
  local claimed = pending(KEYS[i], GROUP)
  local age = oldest and math.max(0, now - tonumber(string.match(oldest[1], '^%d+'))) or 0
  depths[#depths + 1] = {redis.call('XLEN', KEYS[i]), claimed and claimed[1] or 0, age}
end
return {beats, depths}
"""
)
