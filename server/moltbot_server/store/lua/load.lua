-- ARGV: session, how many turns. Answers nothing for no session, else its base, its last ordinal and the latest turns
-- that were answered, the latest first.
local session = ARGV[1]
local first = call('HGET', session_key(session), 'base')
if not first then return {} end
local last = call('ZREVRANGE', order_key(session), 0, 0, 'WITHSCORES')[2] or '0'
local found, start, most = { first, last }, 0, tonumber(ARGV[2])
while most > 0 do
    local names = call('ZREVRANGE', order_key(session), start, start + 49)
    if #names == 0 then break end
    for _, name in ipairs(names) do
        local turn = call('HMGET', turn_key(name), 's', 'q', 'a', 'm', 'c', 'e', 'f')
        if turn[3] and (turn[1] == 'completed' or turn[1] == 'cancelled') and most > 0 then
            turn[1] = string.match(name, '^%d+')
            turn[2] = turn[2] or '\144'
            found[#found + 1] = turn
            most = most - 1
        end
    end
    start = start + 50
end
return found
