-- ARGV: session, how many turns, the node that asks. Answers nothing for no session, else its base, its last ordinal, its
-- version, the node that runs turns of it, and the latest turns that were answered, the latest first, if it may go on here.
local session = ARGV[1]
local kept = call('HMGET', session_key(session), 'base', 'version')
if not kept[1] then return {} end
local last = call('ZREVRANGE', order_key(session), 0, 0, 'WITHSCORES')[2] or '0'
local runs = running_on(session) or ''
local found, start, most = { kept[1], last, kept[2] or '1', runs }, 0, tonumber(ARGV[2])
if runs ~= '' and runs ~= ARGV[3] then return found end
while most > 0 do
    local names = call('ZREVRANGE', order_key(session), start, start + 49)
    if #names == 0 then break end
    for _, name in ipairs(names) do
        local turn = call('HMGET', turn_key(name), 's', 'q', 'a', 'm', 'c', 'e', 'f')
        local counts = (turn[3] or turn[7] == 'joined') and (turn[1] == 'completed' or turn[1] == 'cancelled')
        if counts and most > 0 then
            turn[1] = string.match(name, '^%d+')
            turn[2] = turn[2] or '\144'
            found[#found + 1] = turn
            most = most - 1
        end
    end
    start = start + 50
end
return found
