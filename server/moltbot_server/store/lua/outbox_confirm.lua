-- ARGV: id, the platform's id of what was posted. Answers 0 when there is no such delivery, 1 when nobody was ever given
-- it, or the platform's id, the place, and whether that is news.
local id = ARGV[1]
local found = call('HMGET', delivery_key(id), 's', 'k', 'c', 'a', 'm')
if not found[1] then return 0 end
if found[1] == 'delivered' then return { found[5], found[3], found[4], 0 } end
if found[2] == '0' then return 1 end
local now = milliseconds()
if found[1] == 'open' then dequeue(id, found[3], found[4], now) else unearth(id, found[3]) end
call('HSET', delivery_key(id), 's', 'delivered', 'h', '0', 'e', now, 'm', ARGV[2])
call('HDEL', delivery_key(id), 'v', 'g')
call('ZADD', base .. 'delivered', now, id)
return { ARGV[2], found[3], found[4], 1 }
