-- ARGV: session, how many turns to delete at most, what becomes of the session (`reset`, `delete`, or the time before
-- which it was last used), the node that asks, and the time since which, and for how many seconds, request_ids of turns
-- that were deleted are known. Answers 2 when more is to be done, 1 when it is done, 0 when there is
-- nothing to do, or which other node runs turns of it: nothing is done then.
local session, what = ARGV[1], ARGV[3]
local key = session_key(session)
if what ~= 'reset' and what ~= 'delete' then
    local used = call('HGET', key, 'update')
    if used and tonumber(used) >= tonumber(what) then return 0 end
else
    local runs = running_on(session)
    if runs and runs ~= ARGV[4] then return runs end
end
local last = call('ZREVRANGE', order_key(session), 0, 0, 'WITHSCORES')
local names = call('ZRANGE', order_key(session), 0, ARGV[2] - 1)
-- What takes away comes first: a Redis whose memory is used up lets a script go on that has begun in this way.
call('ZREMRANGEBYRANK', order_key(session), 0, #names - 1)
for _, name in ipairs(names) do
    if what == 'reset' or what == 'delete' then
        local turn = call('HMGET', turn_key(name), 'r', 'c')
        if turn[2] and tonumber(turn[2]) > tonumber(ARGV[5]) and call('HGET', base .. 'requests', turn[1]) == name then
            call('SET', deleted_key(turn[1]), '', 'EX', ARGV[6])
        end
    end
    forget_turn(name)
end
let_go(session)
if what == 'reset' and call('EXISTS', key) == 1 then
    if last[2] and tonumber(last[2]) > tonumber(call('HGET', key, 'base')) then call('HSET', key, 'base', last[2]) end
    call('HSET', key, 'title', '', 'messages', '0')
end
if call('EXISTS', order_key(session)) == 1 then return 2 end
if what == 'reset' then return 1 end
return forget_session(session)
