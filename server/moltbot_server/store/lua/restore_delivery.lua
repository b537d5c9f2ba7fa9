-- ARGV: id, channel, address, turn, request_id, end, create time in milliseconds, state, attempt, attempts before the last
-- retry, when it was over in milliseconds, what is noted of it. Answers 1 when it was not there.
local id, channel, address, state = ARGV[1], ARGV[2], ARGV[3], ARGV[8]
if call('EXISTS', delivery_key(id)) == 1 then return 0 end
call('HSET', delivery_key(id), 's', state, 'h', '0', 'k', ARGV[9], 'b', ARGV[10], 'c', channel, 'a', address,
    't', ARGV[4], 'r', ARGV[5], 'n', ARGV[7], 'e', ARGV[11], 'g', ARGV[12])
if state == 'delivered' then
    call('HSET', delivery_key(id), 'm', ARGV[12])
    call('ZADD', base .. 'delivered', ARGV[11], id)
    return 1
end
call('HSET', delivery_key(id), 'v', ARGV[6])
if state == 'dead' then
    call('ZADD', base .. 'dead', '-' .. ARGV[11], id)
    call('HINCRBY', base .. 'buried', channel, 1)
else
    enqueue(id, channel, address, ARGV[7])
end
return 1
