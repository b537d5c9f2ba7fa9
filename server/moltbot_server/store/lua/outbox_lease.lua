-- ARGV: channel, how many, milliseconds, most attempts, why others are given up. Answers how many were given up, and of
-- each that was leased id and fields.
local channel, until_ms, most = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = milliseconds()
local dead, leased = 0, {}
for _, id in ipairs(call('ZRANGEBYSCORE', due_key(channel), '-inf', now, 'LIMIT', 0, ARGV[2])) do
    local found = call('HMGET', delivery_key(id), 'k', 'b', 'a', 't', 'r', 'v', 'n')
    if found[1] + 1 - found[2] > most then
        bury(id, channel, found[3], now, ARGV[5])
        dead = dead + 1
    else
        call('HSET', delivery_key(id), 'h', '1', 'k', found[1] + 1)
        call('ZADD', due_key(channel), now + until_ms, id)
        leased[#leased + 1] = { id, found[1] + 1, channel, found[3], found[4], found[5], found[6], found[7] }
    end
end
return { dead, leased }
