-- ARGV: id, attempt, why, milliseconds until it can be leased again or nothing for never, most attempts. Answers 0 when
-- there is no such delivery, 1 when the attempt is over, or whether it is dead, the place, and whether that is news.
local id = ARGV[1]
local found = call('HMGET', delivery_key(id), 's', 'h', 'k', 'b', 'c', 'a')
if not found[1] then return 0 end
if found[1] == 'delivered' or found[3] ~= ARGV[2] then return 1 end
if found[2] ~= '1' then return { found[1] == 'dead' and 1 or 0, found[5], found[6], 0 } end
local now = milliseconds()
if ARGV[4] == '' or found[3] - found[4] >= tonumber(ARGV[5]) then
    bury(id, found[5], found[6], now, ARGV[3])
    return { 1, found[5], found[6], 1 }
end
call('HSET', delivery_key(id), 'h', '0', 'g', ARGV[3])
call('ZADD', due_key(found[5]), now + ARGV[4], id)
return { 0, found[5], found[6], 1 }
