-- Posts the bodies of a file, a line each, in turn: wrk -s wrk.lua URL -- FILE. Prints one line of JSON at the end.
local ffi = require("ffi")
ffi.cdef([[
  typedef struct { long seconds; long nanoseconds; } moment;
  int clock_gettime(int clock, moment *now);
]])
local MONOTONIC = 1
local moment = ffi.new("moment")
local requests, at, began = {}, 0, nil
local the_thread

-- Sums over the answers: how many (n), when (t, seconds from the first request) and which (i = 1, 2, …).
-- Globals, since done() runs elsewhere and reads them from the thread.
n, t_first, t_last, sum_t, sum_tt, sum_ti = 0, 0, 0, 0, 0, 0

local function now()
  ffi.C.clock_gettime(MONOTONIC, moment)
  return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
end

function setup(thread)
  the_thread = thread
end

function init(args)
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, body)
  end
end

function request()
  began = began or now()
  at = at % #requests + 1
  return requests[at]
end

function response()
  local t = now() - began
  n = n + 1
  if n == 1 then t_first = t end
  t_last = t
  sum_t, sum_tt, sum_ti = sum_t + t, sum_tt + t * t, sum_ti + t * n
end

function done(summary, latency)
  local errors, value = summary.errors, function(name) return the_thread:get(name) end
  io.write(string.format(
    '\n{"requests": %d, "duration_us": %d, "p50_us": %d, "p95_us": %d, "p99_us": %d, "max_us": %d, '
      .. '"refused": %d, "broken": %d, '
      .. '"n": %d, "t_first": %.6f, "t_last": %.6f, "sum_t": %.9g, "sum_tt": %.12g, "sum_ti": %.12g}\n',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    value("n"), value("t_first"), value("t_last"), value("sum_t"), value("sum_tt"), value("sum_ti")))
end
