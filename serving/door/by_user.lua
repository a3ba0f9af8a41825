-- Names the user of a call of recommend in a header, by whose hash the server is chosen (``DoorOptions.balance``): what a
-- caller has put there is gone. Who is not known goes to any server.

local USER = "x-vivace-user"

function forget_user(headers) headers:remove(USER) end

-- A header holds no byte that is not printed.
function name_user(handle, who)
  if who == "" then return end
  handle:headers():replace(USER, (string.gsub(who, "[^%w_.-]", function(c) return string.format("%%%02X", string.byte(c)) end)))
end
