-- A POST of as many bytes as the first argument says: JSON, or anything at all from 64 KB on.
function init(args)
  local size = tonumber(args[1])
  wrk.method = "POST"
  if size < 65536 then
    wrk.headers["Content-Type"] = "application/json"
    wrk.body = '{"text":"' .. string.rep("x", size - 11) .. '"}'
  else
    wrk.headers["Content-Type"] = "application/octet-stream"
    wrk.body = string.rep("0123456789abcdef", size / 16)
  end
end
