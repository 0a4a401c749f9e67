//! Circuit overlap: `IoU`, its exact chance level, selection of the top n of a score array.
