#!/usr/bin/env bash
# The hub's certificate, and the authority that signs it. Run it where the hub runs:
#
#   deploy/federation/make_certificates.sh DIR HOST_OR_ADDRESS...
#
# makes in DIR: ca.crt (send it to every site), ca.key (keep it off the hub), server.crt and server.key (for the hub).
# Run again, it keeps the authority, so no site needs anything new, and renews server.crt only if it ends within 30 days
# or lacks a name. To make a new authority, remove ca.crt and ca.key yourself: every site then needs the new ca.crt.
#
# CA_DAYS (3650) and SERVER_DAYS (397) set how long they hold.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
dir=$1
shift
umask 077
mkdir -p "$dir"
cd "$dir"

if [ -e ca.crt ] && [ -e ca.key ]; then
  echo "authority kept: $(openssl x509 -in ca.crt -noout -fingerprint -sha256)"
elif [ -e ca.crt ] || [ -e ca.key ]; then
  # A new authority would lock out every site, silently: never do that by accident
  echo "only one of ca.crt and ca.key is in $PWD: put the other one back, or remove both for a new authority" >&2
  exit 1
else
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -sha384 -days "${CA_DAYS:-3650}" \
    -subj "/O=DermaFlow federation/CN=DermaFlow federation authority" -keyout ca.key -out ca.crt \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
  echo "authority made: $(openssl x509 -in ca.crt -noout -fingerprint -sha256)"
fi

# The hub's own processes reach it on loopback
names=""
for name in localhost 127.0.0.1 "$@"; do
  case $name in
    *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) entry="IP:$name" ;;
    *) entry="DNS:$name" ;;
  esac
  case ",$names," in
    *",$entry,"*) ;;
    *) names="${names:+$names,}$entry" ;;
  esac
done

missing() { # names that the certificate lacks
  for name in localhost 127.0.0.1 "$@"; do
    case $name in
      *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) check=-checkip ;;
      *) check=-checkhost ;;
    esac
    openssl x509 -in server.crt -noout "$check" "$name" | grep -q "does match" || echo "$name"
  done
}

if [ -e server.crt ] && [ -e server.key ] && [ -z "$(missing "$@")" ] &&
  openssl verify -CAfile ca.crt server.crt >/dev/null 2>&1 &&
  openssl x509 -in server.crt -noout -checkend $((30 * 86400)) >/dev/null; then
  echo "hub's certificate kept: $(openssl x509 -in server.crt -noout -enddate)"
  exit 0
fi
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/O=DermaFlow federation/CN=hub" \
  -keyout server.key.new -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -sha384 -days "${SERVER_DAYS:-397}" \
  -set_serial "0x$(openssl rand -hex 16)" -out server.crt.new 2>/dev/null -extfile <(
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=serverAuth"
    echo "subjectAltName=$names"
  )
mv server.key.new server.key
mv server.crt.new server.crt
rm server.csr
chmod 644 ca.crt server.crt
echo "hub's certificate made for $names: $(openssl x509 -in server.crt -noout -enddate)"
