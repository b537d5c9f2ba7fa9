-- What was sent twice, because the first answer was lost, is the same turn; what another node sent is not.
local held, found = held_by()
if held then
    if held == name and found[2] == node then return 1 end
    return earlier(held)
end
return judge() or insert()
