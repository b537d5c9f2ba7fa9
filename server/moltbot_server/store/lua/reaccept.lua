-- A turn that another node carries out is taken over by `take_over` and by nothing else.
local held, found = held_by()
if held then
    if is_this(held, found) then return 1 end
    local state = found[1]
    if state == 'completed' or state == 'cancelled' or (state == 'running' and found[2] ~= node) then
        return earlier(held)
    end
end
if not held and was_deleted() then return -1 end
local refusal = judge()
if refusal then return refusal end
if call('EXISTS', turn_key(name)) == 1 then return 0 end
if held then
    if found[1] == 'running' then
        call('HSET', turn_key(held), 's', 'failed')
        call('ZREM', running_key(found[2]), held)
    end
    call('SREM', active_key(session_of(held)), held)
    if found[3] then count_messages(session_of(held), found[4] and -2 or -1) end
    withdraw_delivery(held)
    call('HDEL', turn_key(held), 'q', 'x', 'l')
    call('UNLINK', journal_key(held))
end
return insert()
