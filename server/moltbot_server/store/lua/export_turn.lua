-- ARGV: the name of a turn, and fields of it. Answers those, and what its journal has, as they are at one moment: in a
-- transaction, a Redis whose memory is used up would refuse to read them.
return { call('HMGET', turn_key(ARGV[1]), unpack(ARGV, 2)), call('XRANGE', journal_key(ARGV[1]), '-', '+') }
