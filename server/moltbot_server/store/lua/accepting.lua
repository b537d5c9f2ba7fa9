-- ARGV: node, session, ordinal, request_id, digest, create_time, question, rest, deadline, opens_session, title, user,
-- channel, ephemeral. Answers 1 when the turn is stored, 0 when its number is another turn's, or the turn that has the
-- request_id: its name and fields.
local node, session, request = ARGV[1], ARGV[2], ARGV[4]
local name = ARGV[3] .. ':' .. session

local function held_by()
    local held = call('HGET', base .. 'requests', request)
    if not held then return nil end
    return held, call('HMGET', turn_key(held), 's', 'n', 'q', 'a')
end

local function earlier(held)
    local found = call('HMGET', turn_key(held), 'r', 'd', 's', 'c', 'e', 'v')
    table.insert(found, 1, held)
    return found
end

local function open_session()
    local key = session_key(session)
    if ARGV[10] ~= '1' then return end
    local title = call('HGET', key, 'title')
    if title == '' then
        call('HSET', key, 'title', ARGV[11])
    elseif not title then
        call('HSET', key, 'title', ARGV[11], 'user', ARGV[12], 'channel', ARGV[13], 'create', ARGV[6],
            'update', ARGV[6], 'base', '0', 'ephemeral', ARGV[14], 'messages', '0')
    end
end

local function insert()
    if call('EXISTS', turn_key(name)) == 1 then return 0 end
    call('HSET', turn_key(name), 'r', request, 'd', ARGV[5], 's', 'running', 'c', ARGV[6], 'e', '0', 'm', '',
        'f', '', 'q', ARGV[7], 'p', '1', 'n', node)
    if ARGV[8] ~= '' then call('HSET', turn_key(name), 'x', ARGV[8], 'l', ARGV[9]) end
    call('ZADD', order_key(session), ARGV[3], name)
    call('HSET', base .. 'requests', request, name)
    call('ZADD', running_key(node), call('INCR', base .. 'accepted'), name)
    call('SADD', base .. 'nodes', node)
    open_session()
    count_messages(session, 1)
    touch(session, ARGV[6])
    return 1
end
