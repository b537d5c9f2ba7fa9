-- ARGV: node, and the nodes that are gone. Answers place, name and epoch of each turn that was taken over and not picked
-- up yet: this answer may be lost. Turns of which too little was kept have failed.
local mine = base .. 'taken:' .. ARGV[1]
for place = 2, #ARGV do
    local gone = ARGV[place]
    local found = call('ZRANGE', running_key(gone), 0, -1, 'WITHSCORES')
    for item = 1, #found, 2 do
        local name = found[item]
        local turn = call('HMGET', turn_key(name), 's', 'x')
        if turn[1] == 'running' and turn[2] then
            call('HINCRBY', turn_key(name), 'p', 1)
            call('HSET', turn_key(name), 'n', ARGV[1])
            call('ZADD', running_key(ARGV[1]), found[item + 1], name)
            call('ZADD', mine, found[item + 1], name)
            let_go(session_of(name))
        elseif turn[1] == 'running' then
            call('HSET', turn_key(name), 's', 'failed')
            call('SREM', active_key(session_of(name)), name)
            call('UNLINK', journal_key(name))
        end
    end
    call('UNLINK', running_key(gone), base .. 'taken:' .. gone)
    call('SREM', base .. 'nodes', gone)
end
call('SADD', base .. 'nodes', ARGV[1])
local taken = {}
local waiting = call('ZRANGE', mine, 0, -1, 'WITHSCORES')
for item = 1, #waiting, 2 do
    local turn = call('HMGET', turn_key(waiting[item]), 's', 'n', 'p')
    if turn[1] == 'running' and turn[2] == ARGV[1] then
        taken[#taken + 1] = { waiting[item + 1], waiting[item], turn[3] }
    end
end
return taken
