"""Where images are stored: folders, lists, zips, tsv files, tar shards, published collections, remote files, segmentation masks."""
