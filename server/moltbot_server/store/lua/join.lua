-- Here KEYS[1] is the prefix of the store. ARGV: a node, what its lease tells, how many milliseconds that lasts, and the
-- fingerprint of its key. Adds the node to those that are there, unless some of them tell another fingerprint: then
-- nothing is done, and each of those is answered by its name, when its lease ends (milliseconds of Redis' clock), and
-- what the lease tells. Of two that come at the same moment, one comes first.
local node, told, life, mark = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local strangers = {}
for _, name in ipairs(call('SMEMBERS', base .. ':nodes')) do
    local lease, other = base .. ':node:' .. name, call('GET', base .. ':owner:' .. name)
    local left = call('PTTL', lease)
    if other and other ~= mark and left > 0 then
        table.insert(strangers, {name, now + left, call('GET', lease)})
    end
end
if #strangers > 0 then return strangers end
call('SADD', base .. ':nodes', node)
call('SET', base .. ':node:' .. node, told, 'PX', life)
call('SET', base .. ':owner:' .. node, mark, 'PX', life)
return strangers
