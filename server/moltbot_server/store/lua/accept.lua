local held, found = held_by()
if held then
    if is_this(held, found) then return 1 end
    return earlier(held)
end
if was_deleted() then return -1 end
return judge() or insert()
