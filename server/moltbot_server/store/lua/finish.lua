-- ARGV: node, session, ordinal, epoch, state, end_time, model, answer, events, finish, and what is to be delivered, if
-- anything: id, channel, address, request_id, end. Answers 0 when the turn is another node's, else 1; there may be no such
-- turn.
local session = ARGV[2]
local name = ARGV[3] .. ':' .. session
local found = call('HMGET', turn_key(name), 'p', 'n', 'q', 'a')
if not found[1] then return 1 end
if found[1] ~= ARGV[4] or found[2] ~= ARGV[1] then return 0 end
if ARGV[8] ~= '' then
    call('HSET', turn_key(name), 's', ARGV[5], 'e', ARGV[6], 'm', ARGV[7], 'v', ARGV[9], 'f', ARGV[10], 'a', ARGV[8])
    call('HDEL', turn_key(name), 'x', 'l')
else
    call('HSET', turn_key(name), 's', ARGV[5], 'e', ARGV[6], 'm', ARGV[7], 'v', ARGV[9], 'f', ARGV[10])
    call('HDEL', turn_key(name), 'x', 'l', 'a')
end
call('ZREM', running_key(ARGV[1]), name)
call('SREM', active_key(session), name)
call('UNLINK', journal_key(name))
touch(session, ARGV[6], found[3] and (ARGV[8] ~= '' and 1 or 0) - (found[4] and 1 or 0) or 0)
if ARGV[11] then post(name, ARGV[11], ARGV[12], ARGV[13], ARGV[14], ARGV[15]) end
return 1
