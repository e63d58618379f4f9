# The body of build.sh of `omnilaunch render`. node_script.py assigns the other variables above it.
# shellcheck shell=bash disable=SC2154

from=${1:+$(realpath -- "$1")}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
umask 022

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 3
}

# The first client on PATH that can do BuildKit builds: it is built in before 23, and the plugin buildx from then on.
find_client() {
  local path version
  while IFS= read -r path; do
    version=$("$path" version --format '{{.Client.Version}}' 2>/dev/null) || continue
    if [ "${version%%.*}" -lt 23 ] || "$path" buildx version >/dev/null 2>&1; then
      printf '%s' "$path"
      return
    fi
  done < <(type -ap docker)
}

take_wheels() {
  mkdir -p -- image/wheelhouse image/system
  find image/wheelhouse image/system -mindepth 1 -delete
  if [ -z "$from" ]; then return 0; fi
  if [ -f "$from/wheelhouse.json" ]; then
    sed -n 's|^  "\(.*\)": "\([0-9a-f]\{64\}\)",\{0,1\}$|\2  \1|p' "$from/wheelhouse.json" | (cd -- "$from" && sha256sum --check --quiet --strict -) ||
      die "$from differs from its wheelhouse.json: fill it again with omnilaunch image fetch"
  elif [ "$wheels" = all ]; then
    die "$from is not a complete wheelhouse: it has no wheelhouse.json"
  fi
  find "$from" -maxdepth 1 -type f '(' -name '*.whl' -o -name '*.tar.gz' -o -name '*.zip' ')' -exec cp -t image/wheelhouse -- '{}' +
  if [ -d "$from/system" ]; then cp -R -- "$from/system/." image/system/; fi
}

if [ "$wheels" = all ] && [ -z "$from" ]; then die "name the folder with the packages, since the build has no network: ${0##*/} WHEELHOUSE"; fi
if ! sha256sum --check --quiet --strict image.sha256; then die "the files of image/ are not those of $tag: copy them again"; fi
if grep -qF '://***@' pip.conf; then die "pip.conf: the credentials were left out: write them in place of ***, and chmod 600 pip.conf"; fi
client=$(find_client)
if [ -z "$client" ]; then die "no docker client here has BuildKit, or its engine does not respond: start it, or install docker-buildx"; fi
case $("$client" version --format '{{.Server.Arch}}') in
  "$architecture" | "$engine_architecture") ;;
  *) die "the image is for $architecture: build it on a machine of that architecture, and copy it here" ;;
esac
take_wheels
if [[ $proxy == *'://***@'* ]]; then
  if [ -z "${http_proxy:-}${https_proxy:-}" ]; then die "export http_proxy and https_proxy: $proxy with its credentials"; fi
elif [ -n "$proxy" ]; then
  export http_proxy="$proxy" https_proxy="$proxy"
fi
DOCKER_BUILDKIT=1 "$client" "${build[@]:1}" 2>&1 | tee build.log || die "the image was not built; build.log has the output"
id=$("$client" image inspect --format '{{.Id}}' "$tag")
if [ -n "$keep_id" ]; then printf '%s\n' "$id" >image.id; fi
printf '%s\n%s\n' "$tag" "$id"
