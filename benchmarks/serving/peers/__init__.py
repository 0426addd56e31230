"""The other servers, each as its documentation advises, in environments without MedLoop."""
