-- ARGV: session, title, user, channel, create_time, update_time, base_ordinal, ephemeral. Answers 1 when it was not there.
local key = session_key(ARGV[1])
local kept = call('HGET', key, 'base')
if kept then
    if tonumber(ARGV[7]) > tonumber(kept) then call('HSET', key, 'base', ARGV[7]) end
    return 0
end
call('HSET', key, 'title', ARGV[2], 'user', ARGV[3], 'channel', ARGV[4], 'create', ARGV[5], 'update', ARGV[6],
    'base', ARGV[7], 'ephemeral', ARGV[8], 'messages', '0')
list(ARGV[1], ARGV[3], ARGV[8], ARGV[6])
return 1
