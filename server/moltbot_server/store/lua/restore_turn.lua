-- ARGV: the node whose turns it joins if it runs, session, ordinal, request_id, digest, state, create_time, end_time, model,
-- finish, question, answer, events, rest, deadline, epoch, id of what was kept, what was kept. Empty is nothing.
-- Answers 1 when it was not there.
local session = ARGV[2]
local name = ARGV[3] .. ':' .. session
local asked = ARGV[11] ~= ''
if call('EXISTS', turn_key(name)) == 1 then return 0 end
if asked and call('HSETNX', base .. 'requests', ARGV[4], name) == 0 then return 0 end
call('HSET', turn_key(name), 'r', ARGV[4], 'd', ARGV[5], 's', ARGV[6], 'c', ARGV[7], 'e', ARGV[8], 'm', ARGV[9],
    'f', ARGV[10], 'p', ARGV[16], 'n', ARGV[1])
if asked then call('HSET', turn_key(name), 'q', ARGV[11]) end
if ARGV[12] ~= '' then call('HSET', turn_key(name), 'a', ARGV[12]) end
if ARGV[13] ~= '' then call('HSET', turn_key(name), 'v', ARGV[13]) end
if ARGV[14] ~= '' then call('HSET', turn_key(name), 'x', ARGV[14], 'l', ARGV[15]) end
call('ZADD', order_key(session), ARGV[3], name)
if ARGV[6] == 'running' then
    call('ZADD', running_key(ARGV[1]), call('INCR', base .. 'accepted'), name)
    call('SADD', base .. 'nodes', ARGV[1])
    call('SADD', active_key(session), name)
    if ARGV[18] ~= '' then call('XADD', journal_key(name), ARGV[17], 'e', ARGV[18]) end
end
if asked then count_messages(session, ARGV[12] ~= '' and 2 or 1) end
return 1
