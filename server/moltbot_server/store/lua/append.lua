-- ARGV: node, and for each entry name, epoch, id, events. Answers the places of entries of turns that do not run, or that
-- are not this node's any more. An id that is not above the last one is of an entry that was sent twice.
local left_out = {}
for place = 2, #ARGV, 4 do
    local name = ARGV[place]
    local found = call('HMGET', turn_key(name), 's', 'p', 'n')
    if found[1] == 'running' and found[2] == ARGV[place + 1] and found[3] == ARGV[1] then
        local added = redis.pcall('XADD', journal_key(name), ARGV[place + 2], 'e', ARGV[place + 3])
        if added.err and not string.find(added.err, 'equal or smaller', 1, true) then return added end
    else
        left_out[#left_out + 1] = (place - 2) / 4
    end
end
return left_out
