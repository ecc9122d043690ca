-- Posts the bodies of a file, a line each, in turn: wrk -s wrk.lua URL -- FILE. Prints one line of JSON at the end.
local requests, at = {}, 0

function init(args)
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, body)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "duration_us": %d, "mean_us": %.1f, "p50_us": %d, "p95_us": %d, "p99_us": %d, "max_us": %d, '
      .. '"refused": %d, "broken": %d}\n',
    summary.requests, summary.duration, latency.mean,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
