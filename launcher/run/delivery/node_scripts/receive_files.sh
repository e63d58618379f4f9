# Arguments: a folder, the text of move_files.sh, the prefix of temporary folders. Stdin: a tar archive.
# The files are unpacked into a temporary folder below the target folder and moved when they are complete. A broken stream makes tar fail
# in the middle of a file; at the end of one it leaves complete files only. Temporary folders older than a day are removed.
set -e
umask 022
find "$1" -maxdepth 1 -name "$3.*" -mmin +1440 -exec rm -r -- {} +
incoming=$(mktemp -d -- "$1/$3.XXXXXX")
trap 'rm -r -- "$incoming"' EXIT
chmod 755 -- "$incoming"
tar -C "$incoming" --no-same-owner -xf -
sync -f -- "$incoming"
cd -- "$incoming"
find . -type d -exec sh -c "$2" sh "$1" {} +
