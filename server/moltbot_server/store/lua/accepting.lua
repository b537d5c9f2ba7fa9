-- ARGV: node, session, ordinal, request_id, digest, create_time, question, rest, deadline, opens_session, title, user,
-- channel, ephemeral, version, which is 0 for a session that is new and -2 for one that is taken for new. Answers 1 when the turn is stored, 0 when what its node remembers of the session is old,
-- -1 when the request_id started a turn that was deleted, the node that runs turns of the session, or the turn that has
-- the request_id: its name and fields.
local node, session, request = ARGV[1], ARGV[2], ARGV[4]
local name = ARGV[3] .. ':' .. session

local function held_by()
    local held = call('HGET', base .. 'requests', request)
    if not held then return nil end
    return held, call('HMGET', turn_key(held), 's', 'n', 'q', 'a', 'p', 'c')
end

local function was_deleted() return call('EXISTS', deleted_key(request)) == 1 end

-- What was sent twice, because the first answer was lost, is the same turn. What another node sent is not, nor what this
-- one has taken over, or had before, though it may have the same number.
local function is_this(held, found)
    return held == name and found[2] == node and found[5] == '1' and found[6] == ARGV[6]
end

local function earlier(held)
    local found = call('HMGET', turn_key(held), 'r', 'd', 's', 'c', 'e', 'v', 'n')
    table.insert(found, 1, held)
    return found
end

-- Why this node may not go on with the session, or nil.
local function judge()
    local found = call('HMGET', session_key(session), 'base', 'node', 'version')
    if not found[1] then
        if ARGV[15] == '0' or ARGV[15] == '-2' then return nil end
        return 0
    end
    if found[2] == node and ARGV[15] ~= '-2' then return nil end
    local runs = running_on(session)
    if runs and runs ~= node then return runs end
    if ARGV[15] ~= (found[3] or '1') then return 0 end
    local last = call('ZREVRANGE', order_key(session), 0, 0, 'WITHSCORES')[2]
    if last and tonumber(last) >= tonumber(ARGV[3]) then return 0 end
    return nil
end

-- Notes the turn in its session, which is made where there is none and the turn may open one.
local function enter(place)
    local key = session_key(session)
    local found = call('HMGET', key, 'title', 'version')
    if not found[1] then
        if ARGV[10] ~= '1' then return end
        call('HSET', key, 'title', ARGV[11], 'user', ARGV[12], 'channel', ARGV[13], 'create', ARGV[6],
            'update', ARGV[6], 'base', '0', 'ephemeral', ARGV[14], 'messages', '1', 'node', node,
            'version', version_of(place))
        return list(session, ARGV[12], ARGV[14], ARGV[6])
    end
    local title = found[1]
    if title == '' and ARGV[10] == '1' then title = ARGV[11] end
    if not found[2] then call('HSET', key, 'version', version_of(place)) end
    call('HINCRBY', key, 'version', 1)
    touch(session, ARGV[6], 1, 'title', title, 'node', node)
end

local function insert()
    if call('EXISTS', turn_key(name)) == 1 then return 0 end
    local fields = { 'r', request, 'd', ARGV[5], 's', 'running', 'c', ARGV[6], 'e', '0', 'm', '', 'f', '', 'q', ARGV[7],
        'p', '1', 'n', node }
    if ARGV[8] ~= '' then
        for _, value in ipairs({ 'x', ARGV[8], 'l', ARGV[9] }) do fields[#fields + 1] = value end
    end
    local place = call('INCR', base .. 'accepted')
    call('HSET', turn_key(name), unpack(fields))
    call('ZADD', order_key(session), ARGV[3], name)
    call('HSET', base .. 'requests', request, name)
    call('ZADD', running_key(node), place, name)
    call('SADD', base .. 'nodes', node)
    call('SADD', active_key(session), name)
    enter(place)
    return 1
end
