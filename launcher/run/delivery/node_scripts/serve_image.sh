# Arguments: image, text of serve_image.py, a label for the container, then the arguments of serve_image.py.
set -o pipefail
docker save "$1" | docker run -i --rm --log-driver none --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
  --label "$3" --entrypoint python "$1" -c "$2" "${@:4}"
