-- ARGV: session, first ordinal, how many turns. Answers turns with a question, the oldest first.
local found, start, most = {}, 0, tonumber(ARGV[3])
while most > 0 do
    local names = call('ZRANGEBYSCORE', order_key(ARGV[1]), ARGV[2], '+inf', 'LIMIT', start, 50)
    if #names == 0 then break end
    for _, name in ipairs(names) do
        local turn = call('HMGET', turn_key(name), 'q', 'a', 'm', 'c', 'e', 'f')
        if turn[1] and most > 0 then
            table.insert(turn, 1, (string.match(name, '^%d+')))
            found[#found + 1] = turn
            most = most - 1
        end
    end
    start = start + 50
end
return found
