-- Requests for wrk: the bodies of a folder, one after the other. At the end a line of JSON.
--
--     wrk ... -s serving.lua URL -- FOLDER NUMBER_OF_BODIES CONTENT_TYPE

local requests, turn = {}, 0

function init(args)
  for number = 1, tonumber(args[2]) do
    local file = assert(io.open(args[1] .. "/" .. number, "rb"))
    requests[number] = wrk.format("POST", nil, { ["Content-Type"] = args[3] }, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors, samples = summary.errors, 0
  for number = 1, #latency do
    local _, count = latency(number)
    samples = samples + count
  end
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "median": %f, "p99": %f, "errors": %d, "samples": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout, samples
  ))
end
