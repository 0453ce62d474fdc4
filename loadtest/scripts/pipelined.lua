-- Sixteen requests in one write; wrk counts each answer.
local depth = 16

function init(args)
  local requests = {}
  for i = 1, depth do requests[i] = wrk.format() end
  batch = table.concat(requests)
end

function request()
  return batch
end
