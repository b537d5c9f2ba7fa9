-- Stands before every script. KEYS[1] is how all keys of one workspace begin; the braces in it keep them on one node of
-- a cluster. A turn's name is `ordinal:session`. Times and scores come as text and are not calculated with here.
local base = KEYS[1]
local call = redis.call

local function turn_key(name) return base .. 't:' .. name end
local function journal_key(name) return base .. 'j:' .. name end
local function session_key(session) return base .. 's:' .. session end
local function order_key(session) return base .. 'o:' .. session end
local function running_key(node) return base .. 'run:' .. node end
local function active_key(session) return base .. 'a:' .. session end
local function deleted_key(request) return base .. 'x:' .. request end
local function session_of(name) return string.match(name, '^%d+:(.*)$') end

-- The node that runs turns of a session, or nil. Nodes of a release before keep no such set: they leave turns in it that
-- have ended, and those that they accepted are not in it, of which the last one is looked at all the same.
local function running_on(session)
    for _, name in ipairs(call('SMEMBERS', active_key(session))) do
        local found = call('HMGET', turn_key(name), 's', 'n')
        if found[1] == 'running' then return found[2] end
        call('SREM', active_key(session), name)
    end
    local last = call('ZREVRANGE', order_key(session), 0, 0)[1]
    if not last then return nil end
    local found = call('HMGET', turn_key(last), 's', 'n')
    if found[1] == 'running' then return found[2] end
    return nil
end

-- Others have to load the session again; nobody has it. A version is never used again: it begins with a number that
-- grows with each turn of the workspace, and has room for all that may happen to the session.
local function version_of(place) return place .. '000000000' end
local function change_version(session)
    if call('HEXISTS', session_key(session), 'version') == 1 then
        call('HINCRBY', session_key(session), 'version', 1)
    else
        call('HSET', session_key(session), 'version', version_of(call('INCR', base .. 'accepted')))
    end
end
local function let_go(session)
    if call('EXISTS', session_key(session)) == 0 then return end
    call('HSET', session_key(session), 'node', '')
    change_version(session)
end

-- Indexes of sessions sort by time, the latest first, and then by name: scores are times below zero.
local function list(session, user, ephemeral, now)
    if ephemeral == '1' then
        call('ZADD', base .. 'ephemeral', '-' .. now, session)
        return
    end
    call('ZADD', base .. 'listed', '-' .. now, session)
    if user and user ~= '' then call('ZADD', base .. 'u:' .. user, '-' .. now, session) end
end

-- A session, if there is one, was used, has so many messages more, and further fields.
local function touch(session, now, change, ...)
    local found = call('HMGET', session_key(session), 'user', 'ephemeral', 'messages')
    if not found[2] then return end
    call('HSET', session_key(session), 'update', now, 'messages', (found[3] or 0) + change, ...)
    list(session, found[1], found[2], now)
end

local function count_messages(session, change)
    if change ~= 0 and call('EXISTS', session_key(session)) == 1 then
        call('HINCRBY', session_key(session), 'messages', change)
    end
end

local function forget_session(session)
    local user = call('HGET', session_key(session), 'user')
    call('ZREM', base .. 'listed', session)
    call('ZREM', base .. 'ephemeral', session)
    if user and user ~= '' then call('ZREM', base .. 'u:' .. user, session) end
    return call('DEL', session_key(session))
end

local function forget_turn(name)
    local found = call('HMGET', turn_key(name), 'r', 'n')
    if found[1] and call('HGET', base .. 'requests', found[1]) == name then call('HDEL', base .. 'requests', found[1]) end
    if found[2] then call('ZREM', running_key(found[2]), name) end
    call('SREM', active_key(session_of(name)), name)
    call('UNLINK', turn_key(name), journal_key(name))
end
