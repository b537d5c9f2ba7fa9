-- ARGV: node, session, ordinal, request_id of a turn whose caller was told that it is not stored.
local session = ARGV[2]
local name = ARGV[3] .. ':' .. session
local found = call('HMGET', turn_key(name), 's', 'n', 'r', 'q')
if found[1] ~= 'running' or found[2] ~= ARGV[1] or found[3] ~= ARGV[4] then return 0 end
forget_turn(name)
call('ZREM', order_key(session), name)
if found[4] then count_messages(session, -1) end
if call('EXISTS', order_key(session)) == 0 and call('HGET', session_key(session), 'base') == '0' then
    forget_session(session)
end
return 1
