#!/bin/sh
# Make every secret of compose.yaml, each at random, in ./secrets beside this file. What is there is kept.
#
#   deploy/compose/make_secrets.sh HOST      # HOST: the name by which browsers reach this machine
#
# The folder can be entered by its owner only. The files in it can be read by whoever gets that far: a container sees a
# single file under a user id of its own, and never the folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
host=${1:?usage: make_secrets.sh HOST}
umask 022
mkdir -p "$here/secrets"
chmod 700 "$here/secrets"
cd "$here/secrets"

keep() { # keep NAME: writes what it is given into a file that is not there yet
  if [ -s "$1" ]; then cat > /dev/null; else cat > "$1.new" && mv "$1.new" "$1" && echo "made secrets/$1"; fi
}
random() { openssl rand -hex 24; }

for name in database_password ray_token grafana_password s3_secret_key; do random | tr -d '\n' | keep "$name"; done
printf 'dermaflow' | keep s3_access_key
printf 'operator:%s' "$(random)" | keep prefect_auth
cat << EOF | keep s3.json
{"identities": [{"name": "dermaflow", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$(cat s3_access_key)", "secretKey": "$(cat s3_secret_key)"}]}]}
EOF

# Two keys of the service, of which it keeps the hashes only (serve/access.py): Prometheus' own, and one to begin with.
if [ ! -s keys.json ]; then
  printf 'dfk_%s' "$(random)" > metrics_key
  printf 'dfk_%s' "$(random)" > first_key
  hash() { printf '%s' "$(cat "$1")" | openssl dgst -sha256 -r | cut -d' ' -f1; }
  now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  cat << EOF | keep keys.json
{"keys": [
  {"name": "prometheus", "sha256": "$(hash metrics_key)", "scopes": ["metrics"], "created": "$now"},
  {"name": "first", "sha256": "$(hash first_key)", "scopes": ["batches", "classify", "recommend", "review"], "created": "$now"}
]}
EOF
fi

if [ ! -s tls.crt ]; then # a certificate of an authority of its own; put one that browsers know in its place
  "$here/../federation/make_certificates.sh" tls "$host" > /dev/null
  keep tls.crt < tls/server.crt
  keep tls.key < tls/server.key
fi
