# Arguments: the target folder, then folders below the current one. Creates each of them in the target and moves its files there. A file that
# exists in the target by now is kept.
to=$1
shift
for folder; do
  mkdir -p -- "$to/$folder" || exit
  for file in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
    if [ -f "$file" ] && [ -e "$to/$file" ]; then rm -- "$file" || exit; fi
  done
  find "$folder" -maxdepth 1 -type f -print0 | xargs -0 -r mv -n -t "$to/$folder" -- || exit
done
