-- ARGV: id, and `revive` or `drop`. Answers nothing when there is no such dead letter, else its place.
local id = ARGV[1]
local found = call('HMGET', delivery_key(id), 's', 'c', 'a', 'k')
if found[1] ~= 'dead' then return {} end
unearth(id, found[2])
if ARGV[2] == 'drop' then
    call('DEL', delivery_key(id))
else
    call('HSET', delivery_key(id), 's', 'open', 'b', found[4])
    enqueue(id, found[2], found[3], milliseconds())
end
return { found[2], found[3] }
