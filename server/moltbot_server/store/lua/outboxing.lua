-- The outbox. Of a place, `q:` lists what is open, and the first of it alone has a time in `due:`: when it can be leased
-- next. Times are Redis' own, in milliseconds.
local function delivery_key(id) return base .. 'd:' .. id end
local function queue_key(channel, address) return base .. 'q:' .. channel .. ':' .. address end
local function due_key(channel) return base .. 'due:' .. channel end

local function milliseconds()
    local now = call('TIME')
    return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Lets the first one of a place be leased from now on, unless it can be already.
local function let_go(channel, address, now)
    local first = call('LINDEX', queue_key(channel, address), 0)
    if first then call('ZADD', due_key(channel), 'NX', now, first) end
end

local function enqueue(id, channel, address, now)
    call('SADD', base .. 'channels', channel)
    call('RPUSH', queue_key(channel, address), id)
    call('ZADD', base .. 'open:' .. channel, now, id)
    let_go(channel, address, now)
end

-- Takes an open delivery out of its place, and lets the next one go.
local function dequeue(id, channel, address, now)
    call('LREM', queue_key(channel, address), 1, id)
    call('ZREM', base .. 'open:' .. channel, id)
    call('ZREM', due_key(channel), id)
    let_go(channel, address, now)
end

local function bury(id, channel, address, now, reason)
    dequeue(id, channel, address, now)
    call('HSET', delivery_key(id), 's', 'dead', 'h', '0', 'e', now, 'g', reason)
    call('ZADD', base .. 'dead', '-' .. now, id)
    call('HINCRBY', base .. 'buried', channel, 1)
end

local function unearth(id, channel)
    call('ZREM', base .. 'dead', id)
    if call('HINCRBY', base .. 'buried', channel, -1) <= 0 then call('HDEL', base .. 'buried', channel) end
end

local function post(turn, id, channel, address, request, ending)
    if call('EXISTS', delivery_key(id)) == 1 then return end
    local now = milliseconds()
    call('HSET', delivery_key(id), 's', 'open', 'h', '0', 'k', '0', 'b', '0', 'c', channel, 'a', address, 't', turn,
        'r', request, 'v', ending, 'n', now)
    call('HSET', turn_key(turn), 'o', id)
    enqueue(id, channel, address, now)
end

-- What nobody was given of a turn that gives way to another one.
local function withdraw_delivery(name)
    local id = call('HGET', turn_key(name), 'o')
    if not id then return end
    local found = call('HMGET', delivery_key(id), 's', 'k', 'c', 'a')
    if found[1] == 'open' and found[2] == '0' then
        dequeue(id, found[3], found[4], milliseconds())
        call('DEL', delivery_key(id))
    end
end
