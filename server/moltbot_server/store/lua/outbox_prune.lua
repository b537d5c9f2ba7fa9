-- ARGV: milliseconds for which what is dead or open is kept, those for which what was posted is, how many at most of each,
-- why what is open is given up. Answers how many it was.
local now, most, pruned = milliseconds(), ARGV[3], 0
local keep, given = now - ARGV[1], now - ARGV[2]
for _, id in ipairs(call('ZRANGEBYSCORE', base .. 'delivered', '-inf', '(' .. given, 'LIMIT', 0, most)) do
    call('ZREM', base .. 'delivered', id)
    call('DEL', delivery_key(id))
    pruned = pruned + 1
end
for _, id in ipairs(call('ZRANGEBYSCORE', base .. 'dead', '(' .. -keep, '+inf', 'LIMIT', 0, most)) do
    unearth(id, call('HGET', delivery_key(id), 'c'))
    call('DEL', delivery_key(id))
    pruned = pruned + 1
end
for _, channel in ipairs(call('SMEMBERS', base .. 'channels')) do
    for _, id in ipairs(call('ZRANGEBYSCORE', base .. 'open:' .. channel, '-inf', '(' .. keep, 'LIMIT', 0, most)) do
        local found = call('HMGET', delivery_key(id), 'c', 'a', 'h')
        if found[3] ~= '1' then
            bury(id, found[1], found[2], now, ARGV[4])
            pruned = pruned + 1
        end
    end
end
return pruned
