-- ARGV: milliseconds, and for each lease id and attempt. Answers the places of those that have ended.
local ended = {}
local until_ms = milliseconds() + ARGV[1]
for place = 2, #ARGV, 2 do
    local found = call('HMGET', delivery_key(ARGV[place]), 's', 'h', 'k', 'c')
    if found[1] == 'open' and found[2] == '1' and found[3] == ARGV[place + 1] then
        call('ZADD', due_key(found[4]), until_ms, ARGV[place])
    else
        ended[#ended + 1] = (place - 2) / 2
    end
end
return ended
