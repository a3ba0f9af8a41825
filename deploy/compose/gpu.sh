#!/usr/bin/env bash
# tritonserver in NVIDIA's container. Its management calls need a key: VIVACE_KEY_FILE's, or one made at each start,
# which `docker compose exec triton-gpu cat /tmp/vivace-key` tells.
set -euo pipefail
umask 077
key_file=${VIVACE_KEY_FILE:-/tmp/vivace-key}
[ -s "$key_file" ] || head -c 32 /dev/urandom | base64 | tr -dc 'a-zA-Z0-9' >"$key_file"
key=$(cat "$key_file")
if [ -e /models/model_repository/.held ]; then # as long as it runs, no publish removes this version
  exec 9</models/model_repository/.held
  flock --shared 9
fi
restricted=model-repository,shared-memory,model-config,logging,trace,statistics
beside=()
[ -d /models/model_repository/explain ] && beside=(--load-model=explain) # a version of before it has none
exec tritonserver \
  --model-repository=/models/model_repository \
  --model-control-mode=explicit \
  --load-model=recommend \
  --load-model=append_event \
  --load-model=update_store \
  ${beside[@]+"${beside[@]}"} \
  --model-config-name="${VIVACE_PROFILE:-gpu}" \
  --cache-config=local,size=$(( ${VIVACE_CACHE_MB:-64} << 20 )) \
  --disable-auto-complete-config \
  --http-restricted-api="$restricted:vivace-key=$key" \
  --grpc-restricted-protocol="$restricted:vivace-key=$key" \
  --metrics-config=summary_latencies=true \
  --metrics-config=summary_quantiles=0.5:0.01,0.95:0.002,0.99:0.001 \
  --exit-timeout-secs=10
