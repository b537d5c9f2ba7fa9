-- ARGV: a name of this addition, 1 or -1, its life in seconds, and for each row day, field and six numbers. One that
-- was sent twice counts once; -1 takes back what was added.
local marker, sign = base .. 'added:' .. ARGV[1], tonumber(ARGV[2])
if sign > 0 then
    if not call('SET', marker, '', 'NX', 'EX', ARGV[3]) then return 0 end
elseif call('DEL', marker) == 0 then
    return 0
end
for place = 4, #ARGV, 8 do
    local key = base .. 'used:' .. ARGV[place]
    local kept = call('HGET', key, ARGV[place + 1])
    local sums = kept and { struct.unpack('<dddddd', kept) } or { 0, 0, 0, 0, 0, 0 }
    for number = 1, 6 do sums[number] = sums[number] + sign * tonumber(ARGV[place + 1 + number]) end
    call('HSET', key, ARGV[place + 1], struct.pack('<dddddd', unpack(sums, 1, 6)))
    call('ZADD', base .. 'days', 0, ARGV[place])
end
return 1
