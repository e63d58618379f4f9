# Arguments: cluster.root, then the arguments of docker. Stdin: a tar archive of the build context and of the folder secrets/.
# The first docker on PATH that can do BuildKit builds is used. File modes are kept, since the image's user must be able to read the
# context; the folder above is readable by the building user alone, and removed at the end.
set -e
exec 2>&1
umask 022
mkdir -p -- "$1"
umask 077
work=$(mktemp -d -- "$1/.omnilaunch-build.XXXXXX")
trap 'rm -r -- "$work"' EXIT
shift
tar -C "$work" --no-same-owner -xpf -
cd -- "$work"
if [ -f secrets/proxy ]; then http_proxy=$(cat secrets/proxy); https_proxy=$http_proxy; export http_proxy https_proxy; fi
export DOCKER_BUILDKIT=1
client=docker
IFS=:
for folder in $PATH; do
  if "$folder/docker" build --help 2>/dev/null | grep -q -e --secret; then client=$folder/docker; break; fi
done
"$client" "$@"
